"""The plan: exact sizes, memory that follows its parts, refusals that need no weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from compress import planning
from compress.checkpoint import TensorSpec, checkpoint_bytes, write_checkpoint
from compress.errors import StartError
from compress.formats.folder import default_format, packed_export_note, write_model_folder
from compress.images import windows_given
from compress.opening import open_model
from compress.passes.alps import ALPS
from compress.passes.base import BlockPass, Context, LayerShape
from compress.passes.fp8 import FP8
from compress.passes.gptq import GPTQ
from compress.passes.magnitude import Magnitude
from compress.passes.rtn import RTN
from compress.passes.smoothquant import SmoothQuant
from compress.passes.sparsegpt import SparseGPT
from compress.passes.wanda import Wanda
from compress.planning import Plan, available_memory, plan, refuse
from compress.recipe import Recipe
from compress.shapes import ModelShape
from compress.testing import FAMILIES, tiny_inputs, tiny_model
from compress.workspace import Stage

VARIANTS = {
    "rtn 4 bits, groups": RTN(bits=4, group_size=16),
    "rtn 3 bits, zero points": RTN(bits=3, group_size=32, symmetric=False),
    "rtn 8 bits, channels": RTN(bits=8, group_size=-1),
    "rtn 2 bits, some layers": RTN(bits=2, group_size=-1, symmetric=False, skip=("*down*", "*fc2", "*dense_4h*")),
    "magnitude": Magnitude(sparsity=0.5),
    "smoothquant": SmoothQuant(),
    "fp8": FP8(),
    "fp8, inputs too": FP8(activations="dynamic", targets=("*.self*", "*attn*", "*[aA]ttention*")),
}
#: What no folder holds that plain transformers computes: a Conv1D with rounded inputs.
REFUSED = [("gpt2", "smoothquant"), ("gpt2", "fp8, inputs too")]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each family, named by it."""
    shelf = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        tiny_model(family).save_pretrained(shelf / family)
    (shelf / "text.txt").write_text("some text")
    return shelf


def recipe(model: Path, *passes: BlockPass, **values: object) -> Recipe:
    text = {"source": str(model.parent / "text.txt"), "samples": 8, "length": 32}
    values = {"benchmark": False, "data": {"calibration": text, "evaluation": text}, "min_coverage": 0.0, **values}
    return Recipe.from_dict({"model": str(model), "passes": list(passes), **values}, base=model.parent)


def weights_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_size_is_that_of_the_folder_that_is_written(family: str, variant: str, shelf: Path, tmp_path: Path) -> None:
    pass_ = VARIANTS[variant]
    if (family, variant) in REFUSED:
        with pytest.raises(StartError, match=r"model/: .* a Conv1D, would need: round weights alone") as caught:
            plan(recipe(shelf / family, pass_))
        assert "\n" not in str(caught.value)
        return
    predicted = plan(recipe(shelf / family, pass_))
    handle = open_model(shelf / family)
    stage = Stage(tmp_path / "stage")
    text = windows_given(tiny_inputs(family), handle.config) if pass_.needs_calibration else None
    pass_.run(handle, Context(calibration=text, min_coverage=0.0, stage=stage))
    handle.record(pass_)
    contents = handle.contents()
    write_model_folder(tmp_path / "model", contents)
    written = [weights_bytes(stage.folder), weights_bytes(tmp_path / "model")]
    if packed_export_note(contents):
        write_model_folder(tmp_path / "packed", contents, "packed")
        written.append(weights_bytes(tmp_path / "packed"))
    assert (
        predicted.weights_bytes == predicted.of_pass(0)["weights_bytes"] == written[-1]
    )  # what compress.load runs from
    assert sum(written) < predicted.disk_bytes < sum(written) + 2 * planning.SMALL_FILES_BYTES
    assert predicted.of_pass(0)["disk_bytes"] == written[0] + planning.SMALL_FILES_BYTES
    assert (len(written) == 3) == (default_format(contents) == "dense" and variant != "magnitude")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_size_follows_the_dtype_the_recipe_asks_for(dtype: str, shelf: Path, tmp_path: Path) -> None:
    predicted = plan(recipe(shelf / "llama", RTN(group_size=16), dtype=dtype))
    handle = open_model(shelf / "llama", dtype=dtype)
    RTN(group_size=16).run(handle, Context())
    write_model_folder(tmp_path / "model", handle.contents())
    assert predicted.weights_bytes == weights_bytes(tmp_path / "model")


def test_both_residencies_leave_the_same_size(shelf: Path) -> None:
    sizes = [
        plan(recipe(shelf / "qwen3", RTN(group_size=16), residency=residency)).weights_bytes
        for residency in ("memory", "disk")
    ]
    assert sizes[0] == sizes[1]


def test_shards_are_counted_with_their_headers(tmp_path: Path) -> None:
    tensors = {f"layer.{i}.weight": torch.zeros(7 + i, 5) for i in range(9)}
    specs = [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    for limit in (100, 500, 10**9):
        folder = tmp_path / str(limit)
        folder.mkdir()
        write_checkpoint(folder, specs, tensors.__getitem__, limit)
        assert checkpoint_bytes(specs, limit) == weights_bytes(folder)


def test_no_weight_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    (tmp_path / "text.txt").touch()
    whole = plan(recipe(folder, GPTQ(group_size=16), benchmark={}))
    (folder / "model.safetensors").unlink()
    alone = plan(recipe(folder, GPTQ(group_size=16), benchmark={}))
    assert alone.steps == whole.steps
    assert not (tmp_path / "runs").exists()


def test_the_steps_are_those_of_the_run(shelf: Path) -> None:
    found = plan(recipe(shelf / "llama", Magnitude(), RTN(group_size=16), benchmark={}))
    names = [
        "load", "benchmark original", "magnitude", "magnitude: damage", "magnitude: speed", "rtn", "rtn: damage",
        "export", "benchmark compressed",
    ]  # fmt: skip
    assert [step.name for step in found.steps] == [row[0] for row in found.rows()] == names
    assert [step["name"] for step in found.as_json()["steps"]] == names
    assert found.of_pass(0)["weights_bytes"] > 2 * found.of_pass(1)["weights_bytes"]
    assert found.memory_bytes == max(step.memory_bytes for step in found.steps)
    assert all(step.memory_bytes == sum(step.parts.values()) for step in found.steps)
    short = plan(recipe(shelf / "llama", Magnitude(), RTN(group_size=16)))
    assert [step.name for step in short.steps] == ["load", "magnitude", "rtn", "export"]
    assert short.of_pass(1) == found.of_pass(1)


def names(model: Path, *passes: BlockPass, **values: object) -> list[str]:
    return [step.name for step in plan(recipe(model, *passes, **values)).steps]


def test_damage_and_speed_of_stages_have_steps_only_where_the_run_measures_them(shelf: Path) -> None:
    two = (Magnitude(), RTN(group_size=16))
    assert not any(": " in name for name in names(shelf / "llama", *two))
    only_damage = names(shelf / "llama", *two, benchmark={"metrics": ["perplexity"]})
    assert [name for name in only_damage if ": " in name] == ["magnitude: damage", "rtn: damage"]
    only_speed = names(shelf / "llama", *two, benchmark={"damage": False})
    assert [name for name in only_speed if ": " in name] == ["magnitude: speed"]
    assert not any(": " in n for n in names(shelf / "llama", *two, benchmark={"damage": False, "stages": False}))
    assert not any(": damage" in n for n in names(shelf / "t5", *two, benchmark={}))  # two stacks are not compared


def test_a_damage_step_grows_with_blocks_and_text_and_says_how_to_leave_it_out(shelf: Path) -> None:
    def step(**values: object):
        found = plan(recipe(shelf / "llama", RTN(group_size=16), benchmark={}, **values))
        return next(step for step in found.steps if step.name == "rtn: damage")

    base = step()
    assert base.parts["hidden states"] > 0
    longer = {"evaluation": {"source": str(shelf / "text.txt"), "samples": 8, "length": 64}}
    assert step(data=longer).parts["hidden states"] >= base.parts["hidden states"] > 0
    assert "block" in step(residency="disk").parts
    assert "block" not in base.parts
    own = recipe(shelf / "llama", RTN(group_size=16), benchmark={}, memory="10GB")
    found = plan(own)
    steps = tuple(dataclasses.replace(s, memory_bytes=10**13) if s.name == "rtn: damage" else s for s in found.steps)
    with pytest.raises(StartError, match=r"rtn: damage will take .* benchmark\.damage=false"):
        refuse(dataclasses.replace(found, steps=steps), own)


def test_on_disk_every_stage_is_kept_and_in_memory_the_last_alone(shelf: Path) -> None:
    disks = {
        residency: [s.disk_bytes for s in plan(recipe(shelf / "llama", *passes, residency=residency)).steps]
        for residency in ("memory", "disk")
        for passes in [(Magnitude(), Wanda(), RTN(group_size=16))]
    }
    _, first, second, third, export = disks["memory"]
    assert first < second
    assert third < second < export + first
    assert disks["disk"][3] > disks["disk"][2] > disks["disk"][1] == first
    assert disks["disk"][4] > export


SPECIAL = {
    "group_size 48 does not divide the 32 columns": RTN(group_size=48),
    r"rtn: model\.layers\.0\.self_attn\.q_proj: group_size 7": RTN(group_size=7, targets=("*q_proj",)),
    r"model\.layers\.0\.self_attn\.q_proj: .*5": Magnitude(pattern="2:5"),
    "gptq: no layer is selected": GPTQ(group_size=16, targets=("nothing",)),
    "rtn: no layer is selected; .*q_proj": RTN(group_size=16, skip=("*",)),
}


@pytest.mark.parametrize("said", SPECIAL)
def test_what_shapes_forbid_is_refused_with_the_layer_named(said: str, shelf: Path) -> None:
    with pytest.raises(StartError, match=said) as caught:
        plan(recipe(shelf / "llama", SPECIAL[said]))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_a_format_that_cannot_hold_the_model_is_refused(shelf: Path) -> None:
    with pytest.raises(StartError, match="Conv1D"):
        plan(recipe(shelf / "gpt2", RTN(group_size=16), export=["compressed-tensors"]))


def test_low_coverage_is_noted_and_not_refused(shelf: Path) -> None:
    found = plan(recipe(shelf / "mixtral", RTN(group_size=16), min_coverage=0.9))
    assert "the run will stop" in found.steps[1].note
    assert "100%" in plan(recipe(shelf / "llama", RTN(group_size=16))).steps[1].note


def test_on_a_gpu_the_plan_says_where_the_memory_is(shelf: Path) -> None:
    assert "GPU" in plan(recipe(shelf / "llama", RTN(group_size=16), device="cuda")).steps[0].note
    assert plan(recipe(shelf / "llama", RTN(group_size=16), device="cpu")).steps[0].note == ""


def test_a_dtype_that_is_not_the_stored_one_costs_a_copy_while_loading(shelf: Path) -> None:
    mapped, cast = (
        plan(recipe(shelf / "llama", RTN(group_size=16), dtype=dtype)).steps[0].parts for dtype in ("auto", "float16")
    )
    assert "files while they are cast" not in mapped
    assert cast["files while they are cast"] == 2 * cast["model"]


def peak(shape: dict[str, int], pass_: BlockPass, shelf: Path, **values: object) -> int:
    """Memory of a pass over a Llama of this shape, which exists as a config only."""
    from transformers import LlamaConfig

    folder = shelf / "-".join(["shape", *(f"{key}{value}" for key, value in shape.items())])
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaConfig(**{**sizes, "vocab_size": 1000, **shape}, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return plan(recipe(folder, pass_, **values)).of_pass(0)["peak_memory_bytes"]


PASSES = [RTN(), Magnitude(), Wanda(), SparseGPT(), ALPS(), GPTQ(), SmoothQuant(), FP8()]


@pytest.mark.parametrize("pass_", PASSES, ids=lambda pass_: pass_.name)
def test_memory_grows_with_what_it_depends_on(pass_: BlockPass, shelf: Path) -> None:
    base = peak({}, pass_, shelf)
    assert peak({"num_hidden_layers": 8}, pass_, shelf) > base
    assert peak({"intermediate_size": 1024}, pass_, shelf) > base
    assert peak({}, pass_, shelf, residency="disk") < peak({"num_hidden_layers": 8}, pass_, shelf)
    longer = {"calibration": {"source": str(shelf / "text.txt"), "samples": 64, "length": 128}}
    grows = peak({}, pass_, shelf, data=longer) > base
    assert grows == pass_.needs_calibration


@pytest.mark.parametrize("pass_", PASSES, ids=lambda pass_: pass_.name)
def test_with_blocks_on_disk_memory_does_not_depend_on_the_number_of_layers(pass_: BlockPass, shelf: Path) -> None:
    peaks = {peak({"num_hidden_layers": n}, pass_, shelf, residency="disk") for n in (2, 8)}
    assert len(peaks) == 1


def test_a_pass_states_what_it_takes_itself(shelf: Path) -> None:
    """The engine's parts stay; what the pass says is added."""

    class Hungry(RTN):
        def working_bytes(self, layers, tokens_per_batch):
            assert all(isinstance(layer, LayerShape) for layer in layers)
            return super().working_bytes(layers, tokens_per_batch) + 10**9

    assert peak({}, Hungry(), shelf) == peak({}, RTN(), shelf) + 10**9


def test_a_budget_that_is_too_small_is_refused_with_what_would_help(shelf: Path) -> None:
    small = recipe(shelf / "llama", RTN(group_size=16), memory="1MB")
    found = plan(small)
    with pytest.raises(StartError, match=r"memory: .* will take \d+ MB, and the recipe allows 1 MB.*residency: disk"):
        refuse(found, small)
    refuse(found, recipe(shelf / "llama", RTN(group_size=16), memory="10GB"))


def test_more_than_the_machine_has_is_refused(shelf: Path) -> None:
    own = recipe(shelf / "llama", RTN(group_size=16))
    found = plan(own)
    values = {name: getattr(found, name) for name in Plan.__dataclass_fields__}
    with pytest.raises(StartError, match=r"of memory, and 1 MB are free here"):
        refuse(Plan(**{**values, "available_memory_bytes": 10**6}), own)
    with pytest.raises(StartError, match=r"output: export will take .* of disk.*--output"):
        refuse(Plan(**{**values, "available_disk_bytes": 10**6}), own)
    refuse(found, own)


def test_a_control_group_limits_what_is_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = available_memory()
    (tmp_path / "max").write_text("5000000\n")
    (tmp_path / "current").write_text("3000000\n")
    monkeypatch.setattr(planning, "_CONTROL_GROUPS", [(str(tmp_path / "max"), str(tmp_path / "current"))])
    assert available_memory() == 2_000_000
    (tmp_path / "max").write_text("max\n")
    assert available_memory() > whole // 2


def test_a_shape_has_no_content(shelf: Path) -> None:
    from transformers import AutoConfig

    shape = ModelShape.of(AutoConfig.from_pretrained(shelf / "llama"), torch.float32)
    assert shape.apply(RTN(group_size=16)) == 1.0
    stored = list(shape.handle.model.state_dict().values())
    assert all(tensor.device.type == "meta" for tensor in stored)
    assert any(tensor.dtype == torch.int32 for tensor in stored)
