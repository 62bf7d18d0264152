"""SmoothQuant: its scale, what it does to a block, and that it is worth it where inputs have outliers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import reference
import torch
from transformers import PreTrainedModel

from compress.data import windows_from
from compress.errors import CompressError
from compress.maths.grid import QuantSpec
from compress.model import ModelHandle
from compress.nn.quant_linear import QuantLinear
from compress.opening import open_model
from compress.passes.base import Context, LayerShape
from compress.passes.fp8 import FP8
from compress.passes.smoothquant import ColumnMaxima, SmoothQuant, smoothing_scale
from compress.testing import outputs, tiny_model, tiny_tokens
from compress.walk import walk
from compress.workspace import Stage

TOKENS = tiny_tokens(6, 24)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_scale_is_that_of_the_paper(alpha: float) -> None:
    inputs = reference.random_inputs(50, 12, 0)
    weights = [reference.random_weight(5, 12, 1), reference.random_weight(9, 12, 2)]
    maxima = ColumnMaxima(12)
    for part in np.split(inputs, 5):
        maxima.add(torch.from_numpy(part))
    largest = torch.from_numpy(np.concatenate(weights)).abs().amax(0)
    found = smoothing_scale(maxima.values, largest, alpha)
    torch.testing.assert_close(found.double(), torch.from_numpy(reference.smoothing_scale(inputs, weights, alpha)))


def test_with_one_half_inputs_and_weights_have_the_same_maxima_after() -> None:
    inputs, weights = torch.tensor([16.0, 2.0, 0.5]), torch.tensor([1.0, 2.0, 8.0])
    scale = smoothing_scale(inputs, weights, 0.5)
    assert scale.tolist() == [4.0, 1.0, 0.25]
    assert (inputs / scale).tolist() == (weights * scale).tolist() == [4.0, 2.0, 2.0]


def test_a_channel_of_zeros_is_left_alone() -> None:
    found = smoothing_scale(torch.tensor([0.0, 3.0, 0.0]), torch.tensor([2.0, 0.0, 0.0]), 0.5)
    assert found.tolist() == [1.0, 1.0, 1.0]


def with_outliers() -> PreTrainedModel:
    """A model of which a few channels of every norm's output are a hundred times larger, as in large models."""
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[[3, 17]] *= 100
            for linear in (*layer.self_attn.children(), *layer.mlp.children()):
                if getattr(linear, "in_features", 0) == 32 and linear is not layer.self_attn.o_proj:
                    linear.weight[:, [3, 17]] /= 100
    return model


def test_smoothing_pays_where_inputs_have_outliers(monkeypatch: pytest.MonkeyPatch) -> None:
    def error() -> float:
        model = with_outliers()
        expected = outputs(model, TOKENS)
        SmoothQuant()(model, calibration=TOKENS)
        return float((outputs(model, TOKENS) - expected).square().mean())

    smoothed = error()
    monkeypatch.setattr(
        "compress.passes.smoothquant.find_folds", lambda block, _: ({}, dict.fromkeys(block.layers(), "not tried"))
    )
    assert smoothed < error() / 20


def test_scales_are_of_the_inputs_as_the_block_came_in_and_of_the_weights() -> None:
    """The folded norm and the codes of its stage, from the definitions, with nothing of the package."""
    model = tiny_model("llama")
    layer = model.model.layers[0]
    norm, stage = layer.input_layernorm, [getattr(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj")]
    seen = []
    hook = stage[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().reshape(-1, 32)))
    outputs(model, TOKENS)
    hook.remove()
    weights = [linear.weight.detach().double().numpy() for linear in stage]
    scale = torch.from_numpy(reference.smoothing_scale(torch.cat(seen).double().numpy(), weights, 0.4))
    old = norm.weight.detach().double()
    SmoothQuant(alpha=0.4)(model, calibration=TOKENS)
    torch.testing.assert_close(norm.weight.double(), old / scale, rtol=1e-5, atol=0)
    expected = torch.from_numpy(weights[1]) * scale
    found = layer.self_attn.k_proj.dequantize().double()
    step = layer.self_attn.k_proj.weight_scale.double()
    assert ((found - expected).abs() <= step * 0.501).all()
    torch.testing.assert_close(step[:, 0], expected.abs().amax(1) / 127.5, rtol=1e-5, atol=0)


def test_later_blocks_see_what_the_rounded_ones_give() -> None:
    """The last block's inputs are those of the finished model, whose rounding of inputs is in force."""
    model = tiny_model("llama")
    handle = ModelHandle.wrap(model)
    seen = {}
    original = SmoothQuant.compress_block

    class Watching(SmoothQuant):
        def compress_block(self, block, calibration):
            seen[block.index] = copy.deepcopy(calibration.stream.hidden)
            return original(self, block, calibration)

    walk(Watching(), handle, Context(calibration=windows_from(TOKENS, None)))
    entered = []
    model.model.layers[2].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    outputs(model, TOKENS)
    assert torch.equal(torch.cat(seen[2]), entered[0])


def test_every_layer_reports_where_its_scale_went_or_why_nowhere() -> None:
    result = SmoothQuant(targets=["*.q_proj", "mlp.*"])(tiny_model("llama"), calibration=TOKENS, min_coverage=0)
    entries = result.blocks[0]["layers"]
    assert {name: entry["folded_into"] for name, entry in entries.items()} == {
        "self_attn.q_proj": "input_layernorm",
        "mlp.gate_proj": "post_attention_layernorm",
        "mlp.up_proj": "post_attention_layernorm",
        "mlp.down_proj": "mlp.up_proj",
    }
    assert all(entry["activations"] == "int8" and entry["bits"] == 8 for entry in entries.values())
    entries = SmoothQuant()(tiny_model("gpt2"), calibration=TOKENS).blocks[0]["layers"]
    assert "changes the output of the block" in entries["mlp.c_proj"]["not_folded"]


def test_layers_left_out_are_scaled_and_not_rounded() -> None:
    model = tiny_model("llama")
    before = model.model.layers[0].self_attn.k_proj.weight.clone()
    SmoothQuant(skip=["*.k_proj"])(model, calibration=TOKENS)
    after = model.model.layers[0].self_attn.k_proj
    assert not isinstance(after, QuantLinear)
    assert not torch.equal(after.weight, before)


@pytest.mark.parametrize("pass_", [SmoothQuant(), FP8(activations="dynamic")], ids=lambda pass_: pass_.name)
def test_inputs_that_transformers_would_round_as_a_whole_are_not_rounded(pass_: SmoothQuant | FP8) -> None:
    """OPT hands fc1 and fc2 all tokens as one matrix, for which compressed-tensors has one scale."""
    model = tiny_model("opt")
    pass_(model, calibration=TOKENS if pass_.needs_calibration else None)
    rounding = {name: m.spec.activations for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert {name.rpartition(".")[2] for name, rounds in rounding.items() if not rounds} == {"fc1", "fc2"}
    assert sum(rounding.values()) == 3 * 4


def test_fp8_leaves_inputs_alone_unless_asked() -> None:
    for activations in ("none", "dynamic"):
        model = tiny_model("llama")
        FP8(activations=activations)(model)
        layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
        assert len(layers) == 21
        assert {layer.spec for layer in layers} == {
            QuantSpec(8, -1, True, "float32", "float8", activations == "dynamic")
        }


def run(folder, stage_folder, residency, pass_):
    context = Context(calibration=windows_from(TOKENS, None), stage=Stage(stage_folder), tokens_per_batch=48)
    walk(pass_, open_model(folder, residency=residency), context)
    return {path.name: path.read_bytes() for path in stage_folder.iterdir()}


@pytest.mark.parametrize("pass_", [SmoothQuant(), FP8(activations="dynamic")], ids=lambda pass_: pass_.name)
def test_both_residencies_and_a_continued_run_leave_the_same_bytes(tmp_path, pass_) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    whole = run(tmp_path / "model", tmp_path / "whole", "memory", pass_)
    assert run(tmp_path / "model", tmp_path / "disk", "disk", pass_) == whole
    for residency in ("memory", "disk"):
        for end in ("json", "safetensors"):
            (tmp_path / "disk" / f"model.layers.2.{end}").unlink()
        assert run(tmp_path / "model", tmp_path / "disk", residency, pass_) == whole


def test_without_text_it_says_what_it_lacks() -> None:
    with pytest.raises(CompressError, match="smoothquant needs calibration text"):
        SmoothQuant()(tiny_model("llama"))
    with pytest.raises(CompressError, match="smoothquant needs calibration text"):
        SmoothQuant().compress_block(None, None)


def test_the_plan_is_told_the_grid_of_a_layer() -> None:
    shape = LayerShape("block.0", "mlp", 64, 96, torch.bfloat16)
    assert SmoothQuant().spec_of(shape) == QuantSpec(8, -1, True, "bfloat16", "int8", True)
    assert FP8().spec_of(shape) == QuantSpec(8, -1, True, "bfloat16", "float8", False)
    assert SmoothQuant().observing_bytes([shape], 100) > 100 * (64 + 96) * 2
