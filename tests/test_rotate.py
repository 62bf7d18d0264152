"""Rotate: the same function in another basis, for every family it takes; refusals; what is kept outside the blocks."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch

import compress
from compress import pipeline
from compress.data import windows_from
from compress.errors import CompressError, StartError
from compress.maths.hadamard import Rotation
from compress.model import ModelHandle
from compress.opening import open_model
from compress.passes.base import Context
from compress.passes.magnitude import Magnitude
from compress.passes.rotate import Rotate, head_starts, rotate_rows, rotated_columns, rotated_reader, rotated_writer
from compress.pipeline import run
from compress.planning import plan
from compress.recipe import Recipe
from compress.reports.report import Verified
from compress.residual import find_ends, norm_offset, takes_mean
from compress.testing import outputs, tiny_model, tiny_tokens
from compress.workspace import Stage

WHOLE = ("llama", "qwen3", "mistral", "phi3", "gpt2", "opt", "gpt_neox")
VALUES_ALONE = ("gemma3", "gpt_oss", "mixtral", "bert")
TOKENS = tiny_tokens()


def same_logits(model, before, slack=2e-5):
    return torch.allclose(outputs(model, TOKENS), before, atol=slack, rtol=slack)


@pytest.mark.parametrize("family", WHOLE)
@pytest.mark.parametrize("options", [{}, {"values": False}, {"residual": False}], ids=["both", "residual", "values"])
def test_the_logits_are_those_of_the_original(family, options):
    model = tiny_model(family)
    before = outputs(model, TOKENS)
    result = Rotate(**options)(model)
    assert same_logits(model, before)
    assert (result.coverage == 1.0) == options.get("residual", True)


@pytest.mark.parametrize("family", VALUES_ALONE)
def test_values_alone_are_rotated_where_the_residual_stream_cannot_be(family):
    model = tiny_model(family)
    before = outputs(model, TOKENS)
    result = Rotate(residual=False)(model)
    assert same_logits(model, before)
    assert 0 < result.coverage < 1


def test_a_readers_weight_by_hand():
    # Q = [[1, 1], [1, -1]] / sqrt 2, W diag(g) = [[2, 6]]: (2 + 6, 2 - 6) / sqrt 2
    rotation = Rotation(2)
    rotation.signs = torch.ones(2, dtype=torch.float64)
    reader = rotated_reader(torch.tensor([[1.0, 2.0]]), torch.tensor([2.0, 3.0]).double(), rotation)
    assert torch.allclose(reader, torch.tensor([[8.0, -4.0]]).double() / 2**0.5)
    writer = rotated_writer(torch.tensor([[1.0], [2.0]]), rotation)
    assert torch.allclose(writer, torch.tensor([[3.0], [-1.0]]).double() / 2**0.5)


def test_weights_are_those_of_the_definition():
    model, original = tiny_model("llama"), tiny_model("llama")
    Rotate(values=False, seed=4)(model)
    matrix = Rotation(32, 4).matrix().numpy()
    new, old = model.model.layers[1], original.model.layers[1]

    def numbers(tensor):
        return tensor.detach().double().numpy()

    for norm, names in (("input_layernorm", ["q_proj", "v_proj"]), ("post_attention_layernorm", ["gate_proj"])):
        gain = numbers(old.get_submodule(norm).weight)
        assert (new.get_submodule(norm).weight == 1).all()
        for name in names:
            parent = "self_attn" if name in ("q_proj", "v_proj") else "mlp"
            weight = numbers(old.get_submodule(f"{parent}.{name}").weight)
            expected = reference.rotated_reader(weight, gain, matrix)
            assert np.allclose(numbers(new.get_submodule(f"{parent}.{name}").weight), expected, atol=1e-6), name
    expected = reference.rotated_writer(numbers(old.mlp.down_proj.weight), matrix)
    assert np.allclose(numbers(new.mlp.down_proj.weight), expected, atol=1e-6)
    embedding = numbers(original.model.embed_tokens.weight)
    ones = np.ones(32)
    expected = reference.rotated_reader(embedding, ones, matrix)
    assert np.allclose(numbers(model.model.embed_tokens.weight), expected, atol=1e-6)
    expected = reference.rotated_reader(embedding, numbers(original.model.norm.weight), matrix)
    assert np.allclose(numbers(model.lm_head.weight), expected, atol=1e-6)


def test_values_of_shared_heads_turn_back_in_every_query_head_that_reads_them():
    rows = torch.tensor([0, 1, 0, 1, 2, 3, 2, 3])  # four query heads of two channels, two value heads
    assert head_starts(rows, 4) == [0, 2]
    values, outputs_ = torch.randn(4, 5).double(), torch.randn(3, 8).double()
    rotation = Rotation(2, 1)
    turned = values.clone()
    rotate_rows(turned, [0, 2], rotation)
    assert not torch.allclose(turned, values)
    before = outputs_ @ values[rows]
    assert torch.allclose(rotated_columns(outputs_, 4, rotation) @ turned[rows], before)
    with pytest.raises(ValueError, match="side by side"):
        head_starts(torch.tensor([0, 2, 1, 3]), 2)


def test_an_outlier_column_is_spread_over_all():
    weight = torch.randn(16, 64) * 0.02
    weight[:, 5] = 1.0
    turned = rotated_reader(weight, torch.ones(64), Rotation(64))
    assert turned.abs().max() < 0.3


def test_a_tied_head_gets_a_tensor_of_its_own_and_an_untied_one_is_told_apart():
    tied, untied = tiny_model("llama"), tiny_model("qwen3")
    assert Rotate()(tied).measurements == {"head_untied": True}
    assert tied.lm_head.weight is not tied.model.embed_tokens.weight
    assert not tied.config.tie_word_embeddings
    assert Rotate()(untied).measurements == {"head_untied": False}
    kept = tiny_model("llama")
    Rotate(residual=False)(kept)
    assert kept.lm_head.weight is kept.model.embed_tokens.weight


def test_the_seed_decides_the_rotation():
    weights = []
    for seed in (0, 0, 1):
        model = tiny_model("llama")
        Rotate(seed=seed)(model)
        weights.append(model.model.layers[0].mlp.up_proj.weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_bfloat16_model_stays_one_and_differs_by_its_rounding_alone():
    model = tiny_model("qwen3").bfloat16()
    before = outputs(model, TOKENS).float()
    result = Rotate()(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(block["error"] < 1e-5 for block in result.blocks)  # checked in float32
    after = outputs(model, TOKENS).float()
    assert (after - before).norm() < 0.05 * before.norm()


@pytest.mark.parametrize("index", [0, 2])
def test_a_block_that_would_compute_something_else_is_not_written(index):
    model = tiny_model("llama")
    scale = torch.linspace(0.9, 1.1, 32)
    model.model.layers[index].mlp.register_forward_hook(lambda _, args, out: out * scale)
    before = model.model.layers[index].mlp.up_proj.weight.detach().clone()
    with pytest.raises(CompressError, match=rf"model\.layers\.{index} computes something else") as caught:
        Rotate()(model)
    assert torch.equal(model.model.layers[index].mlp.up_proj.weight, before)
    assert caught.value.exit_code == (2 if index == 0 else 1)


def test_a_projection_between_embedding_and_blocks_is_refused():
    with pytest.raises(StartError, match="not given a sum of embeddings"):
        Rotate()(tiny_model("opt", word_embed_proj_dim=16))


def test_a_gain_of_zero_beside_a_bias_is_refused_where_no_layer_takes_the_bias():
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = 0.0
    with pytest.raises(CompressError, match="gain of 0"):
        Rotate()(model)


def test_a_sparse_model_and_a_pass_that_would_do_nothing_are_refused():
    model = tiny_model("llama")
    Magnitude()(model)
    with pytest.raises(StartError, match="sparse"):
        Rotate()(model)
    with pytest.raises(ValueError, match="nothing is rotated"):
        Rotate(residual=False, values=False)


def test_the_ends_of_the_stream_are_found():
    names = {
        "llama": (("model.embed_tokens",), "model.norm", "lm_head"),
        "gpt2": (("transformer.wte", "transformer.wpe"), "transformer.ln_f", "lm_head"),
        "gemma3": (("model.embed_tokens",), "model.norm", "lm_head"),
    }
    for family, expected in names.items():
        ends = find_ends(ModelHandle.wrap(tiny_model(family)), windows_from(TOKENS[:2], None))
        assert (ends.embeddings, ends.norm, ends.head) == expected


def test_norms_are_told_apart_by_what_they_give():
    norms = {
        family: ModelHandle.wrap(tiny_model(family)).block_list()[0].module for family in ("llama", "gemma3", "gpt2")
    }
    assert norm_offset(norms["llama"].input_layernorm) == 0.0
    assert norm_offset(norms["gemma3"].input_layernorm) == 1.0
    assert norm_offset(norms["gpt2"].ln_1) == 0.0
    assert takes_mean(norms["gpt2"].ln_1)
    assert not takes_mean(norms["gemma3"].input_layernorm)


# ------------------------------------------------------------------------------------------------- whole runs


def recipe(model, output, **changes):
    values = {
        "model": str(model), "passes": ["rotate", {"rtn": {"bits": 4, "group_size": 16}}], "benchmark": False,
        "output": str(output),
    }  # fmt: skip
    return {**values, **changes}


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.fixture
def unchecked(monkeypatch):
    """Reading the written folder in a process of its own takes seconds: one run does it, of others the bytes count."""
    passed = Verified(reloaded=True, by="", max_logit_difference=0.0)
    monkeypatch.setattr(pipeline, "verify", lambda *args, **options: passed)


@pytest.fixture(scope="module")
def checked(tiny_folder, tmp_path_factory):
    """A whole run, its folder read again by plain transformers."""
    output = tmp_path_factory.mktemp("rotated") / "out"
    return output, run(recipe(tiny_folder, output))


def test_the_plan_states_the_size_with_the_head_of_its_own(checked, tiny_folder):
    output, report = checked
    assert report.verified.by == "transformers"
    written = sum(path.stat().st_size for path in (output / "model").glob("*.safetensors"))
    assert report.stages[-1].predicted["weights_bytes"] == written
    assert report.stages[0].measurements == {"head_untied": True}
    bare = plan(Recipe.from_dict(recipe(tiny_folder, output, passes=[{"rtn": {"group_size": 16}}])))
    assert written - bare.weights_bytes > 96 * 32 * 4 - 200


def test_the_plan_states_memory_and_refuses_what_shapes_forbid(tiny_folder, tmp_path):
    for residency in ("memory", "disk"):
        found = plan(Recipe.from_dict(recipe(tiny_folder, tmp_path, passes=["rotate"], residency=residency)))
        step = found.steps[1]
        assert step.name == "rotate"
        assert step.parts["pass"] > 4 * 32 * 64 * 3  # the float32 copy of a block, and more
        assert ("block" in step.parts) == (residency == "disk")
        assert step.disk_bytes > 2 * 96 * 32 * 4  # embedding and head are kept by the stage
    for family, reason in (("gpt_oss", "no linear layer"), ("bert", "no head")):
        tiny_model(family).save_pretrained(tmp_path / family)
        with pytest.raises(StartError, match=reason):
            plan(Recipe.from_dict(recipe(tmp_path / family, tmp_path, passes=["rotate"])))


def test_the_written_model_is_the_rotated_one(tiny_folder, tmp_path, unchecked):
    run(recipe(tiny_folder, tmp_path / "out", passes=["rotate"]))
    model = compress.load(tmp_path / "out")
    assert not model.config.tie_word_embeddings
    assert same_logits(model, outputs(compress.load(tiny_folder), TOKENS))


def test_both_residencies_write_the_same_bytes(checked, tiny_folder, tmp_path, unchecked):
    run(recipe(tiny_folder, tmp_path / "out", residency="disk"))
    assert content(tmp_path / "out" / "model") == content(checked[0] / "model")


@pytest.mark.parametrize("residency", ["memory", "disk"])
def test_a_run_that_stopped_anywhere_continues_to_the_same_bytes(
    checked, tiny_folder, tmp_path, monkeypatch, residency, unchecked
):
    """After the ends are kept, after two blocks, inside the pass that follows, and before anything is exported."""
    places = [(Stage, "keep_outside", 1), (Stage, "keep", 2), (Stage, "keep", 3), (pipeline, "write_model_folder", 1)]
    values = recipe(tiny_folder, tmp_path / "out", residency=residency)
    for owner, name, times in places:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stopping(getattr(owner, name), times))
            with pytest.raises(KeyboardInterrupt):
                run(values)
    run(values)
    assert content(tmp_path / "out" / "model") == content(checked[0] / "model")


def stopping(function, times):
    """The function, which stops the run when it has been called so often."""
    calls = []

    def wrapped(*args, **options):
        result = function(*args, **options)
        calls.append(0)
        if len(calls) == times:
            raise KeyboardInterrupt
        return result

    return wrapped


def test_a_stage_gives_back_what_was_kept_outside_the_blocks(tiny_folder, tmp_path):
    stage = Stage(tmp_path / "stage")
    assert stage.read_outside(torch.device("cpu")) is None
    rotated = open_model(tiny_folder)
    Rotate().run(rotated, Context(stage=stage))
    tensors, quantized = stage.read_outside(torch.device("cpu"))
    assert set(tensors) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert quantized == {}
    fresh = open_model(tiny_folder, residency="disk")
    fresh.restore_outside(tensors, quantized)
    assert set(fresh.outside()) == set(rotated.outside())
    for name, tensor in rotated.outside().items():
        assert torch.equal(fresh.outside()[name], tensor), name
    assert not fresh.config.tie_word_embeddings
