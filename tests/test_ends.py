"""Rounding the embedding and the head: which tensors, what is refused, resuming, and the plan's size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compress.data import windows_from
from compress.ends import find_ends
from compress.errors import StartError
from compress.formats.folder import default_format, packed_export_note, write_model_folder
from compress.maths.grid import find_params, quantize
from compress.nn.quant_embedding import QuantEmbedding, TiedHead
from compress.opening import open_model
from compress.passes.base import Context
from compress.passes.gptq import GPTQ
from compress.passes.rtn import RTN
from compress.planning import plan
from compress.recipe import Recipe
from compress.stream import stream_outputs
from compress.testing import CAUSAL, outputs, save_tiny, tiny_model, tiny_tokens
from compress.workspace import Stage

GRID = {"bits": 4, "group_size": 16}


def test_the_ends_are_found_tied_or_not() -> None:
    assert find_ends(tiny_model("llama")).tied
    untied = find_ends(tiny_model("qwen3"))
    assert (untied.embedding, untied.head, untied.tied) == ("model.embed_tokens", "lm_head", False)
    assert find_ends(tiny_model("bert")).head is None
    model = tiny_model("llama")
    RTN(**GRID, embeddings=8)(model)
    assert find_ends(model).tied
    assert find_ends(model).head == "lm_head"


def test_null_leaves_both_ends_as_they_are() -> None:
    model = tiny_model("qwen3")
    before = model.model.embed_tokens.weight.clone(), model.lm_head.weight.clone()
    RTN(**GRID)(model)
    assert torch.equal(model.model.embed_tokens.weight, before[0])
    assert torch.equal(model.lm_head.weight, before[1])


@pytest.mark.parametrize("options", [{"embeddings": 8}, {"head": 8}, {"embeddings": 8, "head": 8}])
def test_in_a_tied_model_either_option_rounds_the_one_tensor(options: dict[str, int]) -> None:
    model = tiny_model("llama")
    table = model.model.embed_tokens.weight.detach().clone()
    result = RTN(**GRID, **options)(model)
    packed = model.model.embed_tokens
    assert isinstance(packed, QuantEmbedding)
    assert isinstance(model.lm_head, TiedHead)
    scale, zero = find_params(table, packed.spec, search=True)
    assert torch.equal(packed.codes()[0], quantize(table, scale, zero, packed.spec))
    assert packed.spec.bits == 8
    assert list(result.measurements["ends"]) == ["model.embed_tokens"]
    assert result.measurements["ends"]["model.embed_tokens"]["loss"] < 1e-3
    assert not [name for name in model.state_dict() if name.startswith("lm_head")]


def test_untied_ends_have_bits_of_their_own_and_the_head_keeps_its_bias() -> None:
    model = tiny_model("qwen3")
    model.lm_head.bias = torch.nn.Parameter(torch.randn(96))
    RTN(**GRID, embeddings=8, head=4)(model)
    assert model.model.embed_tokens.spec.bits == 8
    assert model.lm_head.spec.bits == 4
    assert model.lm_head.bias is not None
    assert model.lm_head.bias.abs().sum() > 0


def test_a_group_that_does_not_divide_the_hidden_size_becomes_one_per_channel() -> None:
    model = tiny_model("qwen3", hidden_size=48, head_dim=16, intermediate_size=64)
    RTN(bits=4, group_size=32, targets=["self_attn.o_proj", "mlp.down_proj"], embeddings=8, head=8)(
        model, min_coverage=0.0
    )
    assert model.model.embed_tokens.spec.group_size == model.lm_head.spec.group_size == -1
    assert model.model.layers[0].mlp.down_proj.spec.group_size == 32


def test_different_bits_for_one_tensor_are_refused_and_nothing_is_changed() -> None:
    model = tiny_model("llama")
    before = outputs(model, tiny_tokens(1, 8))
    with pytest.raises(StartError, match="embeddings is 8 and head is 4, but in this model lm_head is tied"):
        RTN(**GRID, embeddings=8, head=4)(model)
    assert torch.equal(outputs(model, tiny_tokens(1, 8)), before)


def test_the_plan_refuses_what_a_model_does_not_have(tmp_path: Path) -> None:
    for family, options, said in (
        ("llama", {"embeddings": 8, "head": 4}, "gptq: embeddings is 8 and head is 4"),
        ("bert", {"head": 8}, "gptq: head is 8, and this model has no head"),
    ):
        folder = tmp_path / family
        tiny_model(family).save_pretrained(folder)
        with pytest.raises(StartError, match=said):
            plan(_recipe(folder, GPTQ(**GRID, **options)))


def test_blocks_are_calibrated_on_the_rounded_embedding() -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    GPTQ(**GRID, embeddings=4)(model, calibration=tiny_tokens())
    other.model.embed_tokens.weight.data.copy_(model.model.embed_tokens.dequantize())
    GPTQ(**GRID)(other, calibration=tiny_tokens())
    assert torch.equal(outputs(model, tiny_tokens(2, 12)), outputs(other, tiny_tokens(2, 12)))


def test_coverage_is_of_the_blocks_alone() -> None:
    assert RTN(**GRID, embeddings=8)(tiny_model("llama")).coverage == RTN(**GRID)(tiny_model("llama")).coverage


@pytest.mark.parametrize("family", [*CAUSAL, "bert", "roberta", "distilbert", "modernbert"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_size_is_that_of_the_folders_that_are_written(family: str, symmetric: bool, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path / "base")
    head = {} if find_ends(tiny_model(family)).head is None or not symmetric else {"head": 8}
    pass_ = RTN(**GRID, symmetric=symmetric, embeddings=8, **head)
    predicted = plan(_recipe(tmp_path / "base", pass_))
    handle = open_model(tmp_path / "base")
    stage = Stage(tmp_path / "stage")
    pass_.run(handle, Context(min_coverage=0.0, stage=stage))
    handle.record(pass_)
    contents = handle.contents()
    write_model_folder(tmp_path / "model", contents)
    assert packed_export_note(contents)
    write_model_folder(tmp_path / "packed", contents, "packed")
    sizes = [sum(f.stat().st_size for f in (tmp_path / n).glob("*.safetensors")) for n in ("stage", "model", "packed")]
    assert predicted.weights_bytes == predicted.of_pass(0)["weights_bytes"] == sizes[2]
    assert sum(sizes) < predicted.disk_bytes < sum(sizes) + 2 * (1 << 20) + 100_000
    assert default_format(contents) == ("dense" if family == "gpt2" else "compressed-tensors")


def test_both_residencies_and_a_continued_run_leave_the_same_bytes(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base")
    windows = windows_from(tiny_tokens(), None)
    pass_ = GPTQ(**GRID, embeddings=8)
    whole: list[bytes] = []
    for residency in ("memory", "disk"):
        stage = Stage(tmp_path / residency)
        for _ in range(2):  # the second time nothing is left to do
            handle = open_model(folder, residency=residency)
            pass_.run(handle, Context(windows, stage=stage))
            handle.latest = stage
            write_model_folder(tmp_path / f"{residency}-out", handle.contents(), "packed")
            assert isinstance(handle.model.lm_head, TiedHead)
            assert torch.isfinite(stream_outputs(handle, windows)).all()
            whole.append((tmp_path / f"{residency}-out" / "packed.safetensors").read_bytes())
    assert len(set(whole)) == 1


def test_rounded_ends_are_kept_before_the_first_block_and_not_rounded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "base")
    stage = Stage(tmp_path / "stage")
    pass_ = RTN(**GRID, embeddings=8)
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "keep", _stop)
        with pytest.raises(KeyboardInterrupt):
            pass_.run(open_model(folder), Context(stage=stage))
    assert json.loads((stage.folder / "outside.json").read_text())["record"]["ends"]
    monkeypatch.setattr("compress.ends.round_into", lambda *a: pytest.fail("rounded again"))
    handle = open_model(folder)
    result = pass_.run(handle, Context(stage=stage))
    fresh = open_model(folder)
    monkeypatch.undo()
    assert result.measurements == pass_.run(fresh, Context()).measurements
    assert torch.equal(outputs(handle.model, tiny_tokens(1, 8)), outputs(fresh.model, tiny_tokens(1, 8)))


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def _recipe(model: Path, *passes: RTN | GPTQ) -> Recipe:
    text = model.parent / "text.txt"
    text.write_text("some text")
    data = {"calibration": {"source": str(text), "samples": 8, "length": 32}}
    values = {"benchmark": False, "data": data, "min_coverage": 0.0}
    return Recipe.from_dict({"model": str(model), "passes": list(passes), **values}, base=model.parent)
