"""Folding: the same function with a scale moved, for every family, and refusals of what would not be the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from compress.calibration import BlockCalibration
from compress.folding import Fold, find_folds
from compress.images import windows_given
from compress.model import Block, ModelHandle
from compress.stream import CalibrationStream
from compress.testing import FAMILIES, outputs, tiny_inputs, tiny_model, tiny_tokens

LLAMA = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "self_attn.o_proj": "self_attn.v_proj",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp.up_proj",
}
ATTENTION = {name: of for name, of in LLAMA.items() if "self_attn" in name}
#: What produces each layer's input where a scale can be folded into it.
EXPECTED = {
    **dict.fromkeys(("llama", "qwen3", "mistral"), LLAMA),
    "gemma3": {
        **LLAMA,
        "mlp.gate_proj": "pre_feedforward_layernorm",
        "mlp.up_proj": "pre_feedforward_layernorm",
    },
    "phi3": {
        "self_attn.qkv_proj": "input_layernorm",
        "self_attn.o_proj": "self_attn.qkv_proj",
        "mlp.gate_up_proj": "post_attention_layernorm",
        "mlp.down_proj": "mlp.gate_up_proj",
    },
    "gpt2": {"attn.c_attn": "ln_1", "attn.c_proj": "attn.c_attn", "mlp.c_fc": "ln_2"},
    "opt": {
        "self_attn.q_proj": "self_attn_layer_norm",
        "self_attn.k_proj": "self_attn_layer_norm",
        "self_attn.v_proj": "self_attn_layer_norm",
        "self_attn.out_proj": "self_attn.v_proj",
        "fc1": "final_layer_norm",
        "fc2": "fc1",  # ReLU
    },
    "gpt_neox": {
        "attention.query_key_value": "input_layernorm",
        "attention.dense": "attention.query_key_value",
        "mlp.dense_h_to_4h": "post_attention_layernorm",
    },
    "gpt_oss": ATTENTION,
    "mixtral": ATTENTION,
    "qwen3_moe": ATTENTION,
    "bert": {"attention.output.dense": "attention.self.value"},
    "roberta": {"attention.output.dense": "attention.self.value"},
    "distilbert": {"attention.out_lin": "attention.v_lin"},
    "modernbert": {"attn.Wqkv": "attn_norm", "attn.Wo": "attn.Wqkv", "mlp.Wi": "mlp_norm", "mlp.Wo": "mlp.Wi"},
    "t5": {
        "layer.0.SelfAttention.q": "layer.0.layer_norm",
        "layer.0.SelfAttention.k": "layer.0.layer_norm",
        "layer.0.SelfAttention.v": "layer.0.layer_norm",
        "layer.0.SelfAttention.o": "layer.0.SelfAttention.v",
        "layer.1.DenseReluDense.wi": "layer.1.layer_norm",
        "layer.1.DenseReluDense.wo": "layer.1.DenseReluDense.wi",
    },
    "vit": {
        "attention.q_proj": "layernorm_before",
        "attention.k_proj": "layernorm_before",
        "attention.v_proj": "layernorm_before",
        "attention.o_proj": "attention.v_proj",
        "mlp.fc1": "layernorm_after",
    },
}


def view(model: nn.Module, index: int = 1) -> tuple[Block, BlockCalibration]:
    """A block of the model, and the calibration text as it enters it."""
    handle = ModelHandle.wrap(model)
    windows = windows_given(tiny_inputs(model.config.model_type, 4, 24), model.config)
    stream = CalibrationStream(handle, windows)
    for block in handle.block_list()[:index]:
        stream.advance(block)
    block = handle.block_list()[index]
    return block, BlockCalibration(block, stream)


def folds_of(model: nn.Module) -> tuple[Block, dict[str, Fold], dict[str, str]]:
    block, calibration = view(model)
    return block, *find_folds(block, calibration)


def scale_for(fold: Fold, seed: int = 0) -> torch.Tensor:
    """Any positive scale that the fold admits, from 0.1 to 10."""
    generator = torch.Generator().manual_seed(seed)
    free = 10 ** (2 * torch.rand(len(fold.rows), generator=generator) - 1)
    return fold.shared(free, "mean")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_can_be_folded_is_found_and_the_rest_is_refused_with_a_reason(family: str) -> None:
    block, folds, refused = folds_of(tiny_model(family))
    assert {name: fold.producer for name, fold in folds.items()} == EXPECTED[family]
    assert folds.keys() | refused.keys() == block.layers().keys()
    assert not folds.keys() & refused.keys()
    for name, fold in folds.items():
        assert name in fold.stage
        assert fold.offset == (1.0 if family == "gemma3" and "norm" in fold.producer else 0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folded_scale_leaves_the_model_the_same_and_changes_its_weights(family: str) -> None:
    model = tiny_model(family)
    inputs = tiny_inputs(family)
    expected = outputs(model, inputs)
    block, folds, _ = folds_of(model)
    done: set[tuple[str, ...]] = set()
    for seed, fold in enumerate(folds.values()):
        if fold.stage not in done:
            before = block.layers()[fold.stage[0]].weight.clone()
            fold.apply(block, scale_for(fold, seed))
            assert not torch.allclose(block.layers()[fold.stage[0]].weight, before)
            done.add(fold.stage)
    torch.testing.assert_close(outputs(model, inputs), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_same_is_found_in_sixteen_bits(family: str, dtype: torch.dtype) -> None:
    _, folds, _ = folds_of(tiny_model(family).to(dtype))
    assert {name: fold.producer for name, fold in folds.items()} == EXPECTED[family]


def test_finding_leaves_every_bit_of_the_block_as_it_was() -> None:
    model = tiny_model("gemma3")
    before = copy.deepcopy(model.state_dict())
    folds_of(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_query_heads_that_share_a_value_head_share_its_scale() -> None:
    _, folds, _ = folds_of(tiny_model("llama"))  # 4 query heads of 8 channels, 2 value heads
    fold = folds["self_attn.o_proj"]
    assert fold.rows.tolist() == [*range(8), *range(8), *range(8, 16), *range(8, 16)]
    values = torch.arange(32.0) + 1
    assert fold.shared(values, "amax")[:9].tolist() == [*range(9, 17), 9]
    assert fold.shared(values, "mean")[24:26].tolist() == [21.0, 22.0]
    assert torch.equal(folds["mlp.down_proj"].shared(torch.arange(64.0), "amax"), torch.arange(64.0))


def test_every_layer_of_the_stage_is_scaled_whatever_a_pass_selects() -> None:
    block, folds, _ = folds_of(tiny_model("llama"))
    assert folds["self_attn.q_proj"].stage == ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    layers = block.layers()
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    folds["mlp.up_proj"].apply(block, torch.full((32,), 2.0))
    changed = {name for name, layer in layers.items() if not torch.equal(before[name], layer.weight)}
    assert changed == {"mlp.gate_proj", "mlp.up_proj"}


class Routed(nn.Module):
    """The norm's output also goes to a router: a layer of its own (then it is part of the stage), or by its weight."""

    def __init__(self, mlp: nn.Module, kind: str):
        super().__init__()
        self.mlp, self.kind = mlp, kind
        self.router = nn.Linear(32, 2, bias=False)
        nn.init.normal_(self.router.weight, 0, 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.router(x) if self.kind == "layer" else x @ self.router.weight.T
        return self.mlp(x) * scores.softmax(-1)[..., :1]


@pytest.mark.parametrize("kind", ["layer", "weight"])
def test_a_router_is_scaled_with_the_stage_or_the_stage_is_refused(kind: str) -> None:
    model = tiny_model("llama")
    layer = model.model.layers[1]
    layer.mlp = Routed(layer.mlp, kind)
    expected = outputs(model, tiny_tokens())
    block, folds, refused = folds_of(model)
    if kind == "weight":
        assert "a scale in post_attention_layernorm changes the output" in refused["mlp.mlp.up_proj"]
        return
    fold = folds["mlp.mlp.up_proj"]
    assert set(fold.stage) == {"mlp.mlp.gate_proj", "mlp.mlp.up_proj", "mlp.router"}
    fold.apply(block, scale_for(fold))
    torch.testing.assert_close(outputs(model, tiny_tokens()), expected, rtol=0, atol=1e-4)


def test_a_large_residual_does_not_hide_that_the_output_changes() -> None:
    model = tiny_model("llama")
    layer = model.model.layers[1]
    layer.mlp = Routed(layer.mlp, "weight")
    for last in (layer.self_attn.o_proj, layer.mlp.mlp.down_proj):
        last.weight.data.mul_(1e-4)  # the block adds a ten-thousandth of what passes by
    _, _, refused = folds_of(model)
    assert "mlp.mlp.up_proj" in refused


def test_a_rounded_layer_is_not_scaled() -> None:
    from compress.passes.rtn import RTN

    model = tiny_model("llama")
    block, folds, _ = folds_of(model)
    RTN(group_size=16, targets=["*.v_proj"]).compress_block(block, None)
    with pytest.raises(ValueError, match=r"self_attn\.v_proj of model\.layers\.1 is rounded already"):
        folds["self_attn.o_proj"].apply(block, torch.ones(32))


def test_a_layer_that_no_token_reaches_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1].spare = nn.Linear(32, 32)
    _, folds, refused = folds_of(model)
    assert refused == {"spare": "no calibration token reached it"}
    assert len(folds) == 7


def test_what_the_block_hardly_adds_is_still_proved_by_the_input_of_the_stage() -> None:
    model = tiny_model("gpt_neox")
    model.gpt_neox.layers[1].mlp.dense_4h_to_h.weight.data.mul_(1e-5)  # GELU is not linear, and nobody would see it
    _, folds, refused = folds_of(model)
    assert "mlp.dense_4h_to_h" in refused
    assert "mlp.dense_h_to_4h" in folds
