"""Bits under a budget: what is measured, what is allotted, what is refused, and that it all survives a stop."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from reference import fisher_diagonal, token_divergence

from compress import budget as budgets
from compress.budget import BitBudget, costs_of, limits_of, nearest
from compress.checkpoint import checkpoint_bytes
from compress.data import windows_from
from compress.errors import CompressError, RecipeError, StartError
from compress.formats.folder import write_model_folder
from compress.maths.allocation import Limit, best
from compress.model import Block, Layer, ModelHandle
from compress.opening import open_model, read_config
from compress.passes.base import Context
from compress.passes.gptq import GPTQ
from compress.passes.rtn import RTN
from compress.pipeline import run
from compress.planning import plan
from compress.progress import Step
from compress.recipe import Recipe
from compress.sensitivity import candidate_losses, fisher_losses, kl_losses
from compress.shapes import ModelShape
from compress.testing import outputs, save_tiny, tiny_model, tiny_tokens
from compress.workspace import Stage

ROOT = Path(__file__).parents[1]
CHOICES = (2, 4)
WINDOWS = windows_from(tiny_tokens(2, 12), None)


def _layers(block: Block) -> Mapping[str, Layer]:
    return block.layers(["*.q_proj", "*.down_proj", "*.c_proj"])


def _rounded(layer: Layer, bits: int) -> torch.Tensor:
    return nearest(layer.weight, RTN(group_size=16).spec_at(layer.dtype, bits))


def _by_hand(model: Any, names: list[str], bits: int, windows: Any = WINDOWS) -> float:
    """KL of the whole model in float32 forwards, with the layers `names` rounded in a copy."""
    changed = copy.deepcopy(model)
    for block in ModelHandle.wrap(changed).block_list():
        for name, layer in block.layers().items():
            if f"{block.name}.{name}" in names:
                layer.set_weight(_rounded(layer, bits))
    return token_divergence(outputs(model, windows.tokens), outputs(changed, windows.tokens), windows.mask)


@pytest.mark.parametrize(("family", "at_once"), [("llama", 32), ("gpt2", 3), ("gemma3", 2)])
def test_kl_is_that_of_the_model_with_the_one_layer_rounded(
    family: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.sensitivity.VARIANTS_AT_ONCE", at_once)
    model = tiny_model(family)
    losses = kl_losses(ModelHandle.wrap(model), WINDOWS, _layers, CHOICES, _rounded, Step())
    assert len(losses) == 6
    for name, found in losses.items():
        expected = [_by_hand(model, [name], bits) for bits in CHOICES]
        assert found == pytest.approx(expected, rel=2e-3, abs=1e-7)
        assert found[0] > found[1] > 0


def test_padding_does_not_count() -> None:
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 7:] = False
    padded = windows_from(tiny_tokens(2, 12), None)
    padded = type(padded)(**{**padded.__dict__, "mask": mask})
    model = tiny_model("llama")
    name = "model.layers.1.self_attn.q_proj"
    losses = kl_losses(ModelHandle.wrap(model), padded, _layers, (2,), _rounded, Step())
    assert losses[name][0] == pytest.approx(_by_hand(model, [name], 2, padded), rel=2e-3)


def test_fisher_is_half_the_sum_of_squared_gradients_times_squared_changes() -> None:
    for family in ("llama", "gpt2"):
        model = tiny_model(family)
        losses = fisher_losses(ModelHandle.wrap(model), WINDOWS, _layers, CHOICES, _rounded, Step())
        assert len(losses) == 6
        for block in ModelHandle.wrap(model).block_list():
            for name, layer in _layers(block).items():
                information = fisher_diagonal(model, layer.module.weight, WINDOWS.tokens)
                information = information.t() if layer.transposed else information
                for bits, found in zip(CHOICES, losses[f"{block.name}.{name}"], strict=True):
                    change = (layer.weight - _rounded(layer, bits)).double()
                    assert found == pytest.approx(float((information * change.square()).sum() / 2), rel=1e-3)


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    model.model.layers[0].requires_grad_(False)
    tensors = {name: (p, p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    for measure in (kl_losses, fisher_losses):
        measure(ModelHandle.wrap(model), WINDOWS, _layers, CHOICES, _rounded, Step())
    for name, parameter in model.named_parameters():
        assert parameter is tensors[name][0]
        assert torch.equal(parameter, tensors[name][1])
        assert parameter.requires_grad == tensors[name][2]


def test_candidates_are_measured_with_all_their_layers_rounded() -> None:
    model = tiny_model("llama")
    handle = ModelHandle.wrap(model)
    names = [f"{block.name}.{name}" for block in handle.block_list() for name in _layers(block)]
    found = candidate_losses(handle, WINDOWS, _layers, [dict.fromkeys(names, bits) for bits in CHOICES], _rounded)
    assert found == pytest.approx([_by_hand(model, names, bits) for bits in CHOICES], rel=1e-3)


@pytest.mark.parametrize("average", [2, 2.7, 3.5, 8])
def test_the_average_is_kept_and_nearly_reached(average: float) -> None:
    result = RTN(bits={"average": average}, group_size=16, sensitivity="fisher")(tiny_model(), tiny_tokens(4, 16))
    account = result.measurements["allocation"]
    assert average - 0.15 < account["average_bits"] <= average
    layers = {f"{b['name']}.{n}": entry["bits"] for b in result.blocks for n, entry in b["layers"].items()}
    assert layers == account["bits"]
    assert {m.spec.bits for m in result.model.modules() if hasattr(m, "spec")} == set(layers.values())


def test_the_account_sets_the_predicted_loss_beside_the_measured_one() -> None:
    result = GPTQ(bits={"average": 3.5}, group_size=16)(tiny_model(), calibration=tiny_tokens(8, 32))
    account = json.loads(json.dumps(result.measurements["allocation"], allow_nan=False))
    assert account["windows"] == [4, 4]
    assert account["uniform"]["bits"] == 3
    assert account["predicted_loss"] < account["uniform"]["predicted_loss"]
    assert account["measured_loss"] < account["uniform"]["measured_loss"]
    assert account["predicted_loss"] == pytest.approx(account["measured_loss"], rel=0.5)
    assert account["fallback"] is None


def test_the_model_diverges_less_than_with_the_same_bits_everywhere() -> None:
    tokens = tiny_tokens(8, 32, seed=5)
    divergence = []
    for bits in (3, {"average": 3.0}):
        model = tiny_model()
        before = outputs(model, tokens)
        RTN(bits=bits, group_size=16)(model, calibration=tiny_tokens(8, 32))
        divergence.append(token_divergence(before, outputs(model, tokens)))
    assert divergence[1] < divergence[0]


def test_an_allocation_that_is_worse_on_other_text_gives_way_to_the_same_bits_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("compress.sensitivity.candidate_losses", lambda *a: [0.2, 0.1])
    result = RTN(bits={"average": 3.5}, group_size=16, sensitivity="fisher")(tiny_model(), tiny_tokens(4, 16))
    account = result.measurements["allocation"]
    assert set(account["bits"].values()) == {3}
    assert account["fallback"].startswith("3 bits everywhere")
    assert account["measured_loss"] == 0.2


def test_a_layer_that_no_token_reached_gets_no_fewer_bits_than_in_a_uniform_model() -> None:
    losses = [[0.0, 0.0, 0.0], [5.0, 1.0, 0.1], [4.0, 1.2, 0.1]]
    limits = [Limit([[2, 3, 4]] * 3, 9)]
    assert best(losses, limits) == [0, 1, 2]
    assert best(budgets.guarded(losses, 1), limits) == [1, 1, 1]
    assert budgets.guarded(losses, 1)[1:] == losses[1:]


def test_layers_left_out_are_not_counted() -> None:
    pass_ = RTN(bits={"average": 4, "choices": [2, 8]}, group_size=16, skip=["mlp.*"], sensitivity="fisher")
    account = pass_(tiny_model(), tiny_tokens(4, 16), min_coverage=0.0).measurements["allocation"]
    assert not [name for name in account["bits"] if "mlp" in name]
    assert 3 < account["average_bits"] <= 4


@pytest.mark.parametrize(
    ("bits", "said"),
    [
        ({"average": 3, "choices": []}, "choices is empty: name some of 2, 3, 4, 8"),
        ({"average": 3, "choices": [3, 5]}, "5 is not allowed"),
        ({"average": 9}, "average is 9, and choices go from 2 to 8"),
        ({"average": 2.5, "choices": [3, 4]}, "average is 2.5, and choices go from 3 to 4"),
        ({"choices": [3, 4]}, "bits needs either average"),
        ({"average": 3, "size": "1MB"}, "bits needs either average"),
        ({"size": "much"}, '"much" is not a size'),
        ({"averge": 3}, 'unknown key; allowed: average, size, choices. Did you mean "average"'),
        (5, "bits is 5: use 2, 3, 4 or 8, or grid gguf-q5_k"),
        ("4", '"4" is not allowed'),
    ],
)
def test_what_cannot_be_is_refused_when_the_recipe_is_read(bits: Any, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict({"model": "builtin:tiny", "passes": [{"gptq": {"bits": bits}}]})
    assert said in str(caught.value)
    assert "passes.0.gptq" in str(caught.value)
    assert "bits" in str(caught.value)


def test_rtn_with_a_budget_needs_text_and_without_one_does_not(tiny_folder: Path) -> None:
    with pytest.raises(RecipeError, match="rtn needs text"):
        Recipe.from_dict({"model": str(tiny_folder), "passes": [{"rtn": {"bits": {"average": 3}}}], "benchmark": False})
    Recipe.from_dict({"model": str(tiny_folder), "passes": [{"rtn": {"bits": 3}}], "benchmark": False})
    with pytest.raises(StartError, match="rtn needs calibration text"):
        RTN(bits={"average": 3}, group_size=16)(tiny_model())


def test_options_rebuild_the_pass_and_a_number_still_sets_the_bits(tiny_folder: Path, text_file: Path) -> None:
    for bits in ({"average": 3.5}, {"size": "40MB", "choices": [4, 2]}, 3):
        pass_ = GPTQ(bits=bits)
        assert GPTQ(**pass_.options()) == pass_
    assert GPTQ(bits={"size": "40MB", "choices": [4, 2, 4]}).options()["bits"] == {"size": "40MB", "choices": [2, 4]}
    path = tiny_folder.parent / "budget.yaml"
    path.write_text(f"model: {tiny_folder}\npasses:\n  - gptq:\n      bits: {{average: 3.5}}\ndata: {text_file}\n")
    path.write_text(path.read_text().replace(f"data: {text_file}", f"data:\n  calibration: {text_file}"))
    assert Recipe.load(path).passes[0].bits == BitBudget(average=3.5)
    assert Recipe.load(path, ["passes.gptq.bits=3"]).passes[0].bits == 3
    assert Recipe.load(path, ["passes.gptq.bits.average=3"]).passes[0].bits == BitBudget(average=3)


def _recipe(folder: Path, text: Path, **options: Any) -> Recipe:
    data = {"calibration": {"source": str(text), "samples": 8, "length": 32}}
    entry = {"rtn": {"group_size": 16, "sensitivity": "fisher", **options}}
    return Recipe.from_dict({"model": str(folder), "passes": [entry], "data": data, "benchmark": False})


def _written(folder: Path, recipe: Recipe, out: Path) -> int:
    handle = open_model(folder)
    recipe.passes[0].run(handle, Context(windows_from(tiny_tokens(8, 32), None)))
    contents = handle.contents()
    write_model_folder(out, contents, "packed")
    return sum(file.stat().st_size for file in out.glob("*.safetensors"))


def _packed_size(folder: Path, recipe: Recipe) -> int:
    """By the plan, which is exact where each layer gets the same."""
    shape = ModelShape.of(read_config(folder), torch.float32)
    shape.apply(recipe.passes[0])
    return checkpoint_bytes(shape.contents().tensors)


@pytest.mark.parametrize("bits", [{"average": 2.6}, {"average": 3.5, "choices": [3, 4]}, {"average": 5}])
def test_the_plan_states_an_upper_bound_that_is_nearly_reached(
    bits: Any, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = _recipe(tiny_folder, text_file, bits=bits)
    planned = plan(recipe)
    found = _written(tiny_folder, recipe, tmp_path / "out")
    assert 0.98 * planned.weights_bytes < found <= planned.weights_bytes
    assert "upper bound" in planned.steps[1].note


@pytest.mark.parametrize("ends", [{}, {"embeddings": 8}])
@pytest.mark.parametrize("share", [0.0, 0.3, 5.0])
def test_a_size_is_kept_to_the_byte(
    share: float, ends: dict[str, int], tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    least, most = (_packed_size(tiny_folder, _recipe(tiny_folder, text_file, bits=bits, **ends)) for bits in (2, 8))
    size = int(least + share * (most - least))
    recipe = _recipe(tiny_folder, text_file, bits={"size": size}, **ends)
    planned = plan(recipe)
    found = _written(tiny_folder, recipe, tmp_path / "out")
    assert found <= size
    assert found > min(size, most) * 0.97
    assert found <= planned.weights_bytes <= size


def test_a_size_below_the_fewest_bits_is_refused_with_what_they_take(tiny_folder: Path, text_file: Path) -> None:
    with pytest.raises(StartError, match=r"rtn: bits.size is 20 kB, and with 3 bits in every layer .* \d+ bytes"):
        plan(_recipe(tiny_folder, text_file, bits={"size": "20 kB", "choices": [3, 4]}))


def test_grids_with_zero_points_of_several_bits_are_refused_by_the_plan(tiny_folder: Path, text_file: Path) -> None:
    with pytest.raises(StartError, match="share one grid"):
        plan(_recipe(tiny_folder, text_file, bits={"average": 4}, symmetric=False))
    plan(_recipe(tiny_folder, text_file, bits={"average": 4, "choices": [4]}, symmetric=False))


def test_a_group_that_does_not_divide_is_refused_by_the_plan(tiny_folder: Path, text_file: Path) -> None:
    with pytest.raises(StartError, match="group_size 24 does not divide"):
        plan(_recipe(tiny_folder, text_file, bits={"average": 4}, group_size=24))


def test_no_allocation_takes_more_bytes_than_the_one_the_plan_is_made_with() -> None:
    handle = ModelHandle.wrap(tiny_model("llama", intermediate_size=51))
    budget = BitBudget(average=3.5)
    costs = costs_of(RTN(bits=budget, group_size=-1), budget, handle)  # rows that do not fill their last word
    limits, filled = limits_of(budget, costs)
    losses = [[(-1.0) * b for b in row] for row in costs.bytes]  # the more bytes, the better
    chosen = budgets.fitted(losses, costs, limits, filled)
    assert costs.file_bytes(chosen) <= costs.file_bytes(filled)


def test_both_residencies_and_a_continued_run_leave_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "base", num_hidden_layers=2)
    windows = windows_from(tiny_tokens(4, 16), None)
    found = []
    for residency in ("memory", "disk"):
        for sensitivity in ("kl", "fisher"):
            budget = {"average": 3.5, "choices": [2, 4]}
            pass_ = GPTQ(bits=budget, group_size=16, sensitivity=sensitivity, search=False)
            stage = Stage(tmp_path / residency / sensitivity)
            kept = Stage.keep

            def stop(self: Stage, block: Block, record: Any, kept: Any = kept) -> None:
                kept(self, block, record)
                if block.index == 0:
                    raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(Stage, "keep", stop)
                with pytest.raises(KeyboardInterrupt):
                    pass_.run(open_model(folder, residency=residency), Context(windows, stage=stage))
            with monkeypatch.context() as patch:
                patch.setattr("compress.passes.rounding.choose_bits", lambda *a: pytest.fail("measured again"))
                handle = open_model(folder, residency=residency)
                result = pass_.run(handle, Context(windows, stage=stage))
            handle.latest = stage
            write_model_folder(tmp_path / residency / sensitivity / "out", handle.contents())
            bytes_ = (tmp_path / residency / sensitivity / "out" / "model.safetensors").read_bytes()
            found.append((sensitivity, bytes_, json.dumps(result.measurements)))
            if residency == "memory":
                whole = open_model(folder)
                pass_.run(whole, Context(windows))
                write_model_folder(tmp_path / "whole", whole.contents())
                assert (tmp_path / "whole" / "model.safetensors").read_bytes() == bytes_
    assert found[0] == found[2]
    assert found[1] == found[3]


def test_with_residency_disk_one_block_at_most_is_in_memory_while_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "base")
    handle = open_model(folder, residency="disk")
    most = []
    load = ModelHandle.load

    def watched(self: ModelHandle, block: Block) -> Block:
        found = load(self, block)
        most.append(self.live_blocks)
        return found

    monkeypatch.setattr(ModelHandle, "load", watched)
    for measure in (kl_losses, fisher_losses):
        measure(handle, WINDOWS, _layers, CHOICES, _rounded, Step())
    assert max(most) == 1
    assert handle.live_blocks == 0


def test_fisher_says_that_it_needs_a_head() -> None:
    with pytest.raises(CompressError, match="use sensitivity: kl"):
        RTN(bits={"average": 3}, group_size=16, sensitivity="fisher")(tiny_model("bert"), tiny_tokens(4, 16))
    RTN(bits={"average": 3, "choices": [2, 4]}, group_size=16)(tiny_model("bert"), tiny_tokens(4, 16))


KILLER = """
import os, signal, sys
import compress.workspace, compress.pipeline
kept, count = compress.workspace.Stage.keep, [0]
def keep(*args):
    kept(*args)
    count[0] += 1
    if count[0] == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
compress.workspace.Stage.keep = keep
compress.pipeline.run(sys.argv[1])
"""


@pytest.mark.slow
def test_a_killed_run_with_a_budget_and_a_rounded_embedding_ends_with_the_same_bytes(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    values = _recipe(tiny_folder, text_file, bits={"average": 3.5}, embeddings=8).canonical()
    whole = run({**values, "output": str(tmp_path / "whole")})
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({**values, "output": str(tmp_path / "out")}))
    done = forks.python(KILLER, path, 2)
    assert done.returncode == -9, done.stderr
    stage = tmp_path / "out" / ".compress" / "stages" / "00-rtn"
    assert {"allocation.json", "outside.json", "model.layers.1.json"} <= {file.name for file in stage.iterdir()}
    report = run(str(path))
    for name in ("model/model.safetensors", "exports/packed/packed.safetensors", "model/compress.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert report.stages[0].measurements == whole.stages[0].measurements
    assert whole.verified.max_logit_difference == 0.0
    assert any("model.embed_tokens" in note for note in whole.notes)


@pytest.mark.parametrize("name", ["rtn", "gptq", "awq", "hqq", "autoround"])
def test_every_rounding_pass_gives_a_layer_the_bits_that_the_budget_gave_it(name):
    from compress.registry import PASSES
    from compress.testing import small_options, tiny_model, tiny_tokens

    cls = PASSES.get(name)
    options = {**small_options(cls), "bits": {"average": 3.0, "choices": [2, 4]}, "sensitivity": "fisher"}
    model = tiny_model("llama")
    result = cls(**options)(model, calibration=tiny_tokens())
    reported = {
        f"{block['name']}.{layer}": entry["bits"] for block in result.blocks for layer, entry in block["layers"].items()
    }
    packed = {name: module.spec.bits for name, module in model.named_modules() if hasattr(module, "weight_packed")}
    assert reported == packed
    assert set(packed.values()) == {2, 4}
