"""What a pass did to each block, against running the whole model with one block replaced."""

import copy
import json
import re
from dataclasses import replace

import pytest
import torch

from compress.data import windows_from
from compress.explaining import Wanted, pairs_of, stage_figures
from compress.measure import damage as measuring
from compress.measure.damage import chosen, matrices, measure_damage, text_loss, worst
from compress.model import ModelHandle
from compress.opening import open_model
from compress.passes.base import Context
from compress.passes.depth import Depth
from compress.passes.rotate import Rotate
from compress.passes.rtn import RTN
from compress.passes.width import Width
from compress.pipeline import run
from compress.recipe import Recipe
from compress.testing import save_tiny, tiny_model, tiny_tokens
from tests.reference import block_damage, mean_kl, next_token_loss

TOKENS = tiny_tokens(samples=3, length=12)
WINDOWS = windows_from(TOKENS, None)


def rounded(bits=3):
    """A model, and the same one rounded to nearest: weights that were changed where they stand."""
    model = tiny_model(num_hidden_layers=3)
    changed = copy.deepcopy(model)
    RTN(bits=bits, group_size=16)(changed)
    return model, changed


def dense(model):
    """The model with plain layers in the place of packed ones."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "QuantLinear":
            layer = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            layer.weight.data = module.dequantize(torch.float32)
            model.set_submodule(name, layer)
    return model


def damage(before, after, pairs, windows=WINDOWS, **options):
    return measure_damage(ModelHandle.wrap(before), ModelHandle.wrap(after), windows, pairs, **options)


def test_every_blocks_figures_are_those_of_the_model_with_that_block_alone_replaced():
    model, changed = rounded()
    found = damage(model, changed, [0, 1, 2])
    for index, block in enumerate(found["blocks"]):
        expected = block_damage(model, dense(changed), TOKENS, index, index)
        assert block["name"] == f"model.layers.{index}"
        assert block["error"] == pytest.approx(expected["error"], rel=1e-3)
        assert block["kl"] == pytest.approx(expected["kl"], rel=1e-2)
        assert block["rise"] == pytest.approx(expected["rise"], abs=1e-5)
        assert block["layers"] == pytest.approx(expected["layers"], rel=1e-3)
    before, after = model(TOKENS).logits, changed(TOKENS).logits
    assert found["kl"] == pytest.approx(mean_kl(before, after), rel=1e-2)
    assert found["loss"]["before"] == pytest.approx(next_token_loss(before, TOKENS), rel=1e-5)
    assert found["loss"]["rise"] == pytest.approx(next_token_loss(after, TOKENS) - found["loss"]["before"], abs=1e-5)
    assert found["loss"]["stderr"] > 0


def test_the_worst_layers_are_those_with_the_largest_error_and_no_more_than_five():
    model, changed = rounded()
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj = copy.deepcopy(model.model.layers[1].mlp.down_proj)
        changed.model.layers[1].mlp.down_proj.weight *= 2
    found = damage(model, changed, [0, 1, 2])["worst"]
    assert found[0] == {"layer": "model.layers.1.mlp.down_proj", "error": pytest.approx(1.0)}
    assert len(found) == 5
    assert [each["error"] for each in found] == sorted((each["error"] for each in found), reverse=True)


def test_a_block_that_was_not_changed_has_no_damage():
    model, changed = rounded()
    changed.model.layers[1] = copy.deepcopy(model.model.layers[1])
    same = damage(model, changed, [0, 1, 2])["blocks"][1]
    assert (same["error"], same["kl"], same["rise"]) == (0, 0, 0)
    assert set(same["layers"].values()) == {0.0}
    assert worst([same]) == []


def test_a_removed_block_is_marked_and_has_the_damage_of_skipping_it():
    model = tiny_model(num_hidden_layers=3)
    handle, smaller = ModelHandle.wrap(model), ModelHandle.wrap(copy.deepcopy(model))
    pass_ = Depth(drop=[1])
    done = pass_.run(smaller, Context(calibration=WINDOWS))
    pairs = pairs_of(pass_, handle, smaller, done.blocks)
    assert pairs == [0, None, 1]
    found = measure_damage(handle, smaller, WINDOWS, pairs)
    expected = block_damage(model, model, TOKENS, 1, None)
    gone = found["blocks"][1]
    assert gone["removed"] is True
    assert gone["kl"] == pytest.approx(expected["kl"], rel=1e-3)
    assert gone["error"] == pytest.approx(expected["error"], rel=1e-3)
    assert gone["layers"] == {}
    assert found["kl"] == pytest.approx(gone["kl"], rel=1e-3)
    assert "removed" not in found["blocks"][0]


def test_a_narrower_block_is_replaced_whole_and_its_narrower_layers_are_left_out():
    model = tiny_model(num_hidden_layers=2)
    changed = copy.deepcopy(model)
    changed = Width(intermediate_size=32)(changed, calibration=TOKENS).model
    found = damage(model, changed, [0, 1])
    assert all(block["kl"] > 0 and block["error"] > 0 for block in found["blocks"])
    assert set(found["blocks"][0]["layers"]) == {f"self_attn.{name}_proj" for name in "qkvo"}


@pytest.mark.parametrize(
    ("pass_", "why"), [(Rotate(), "another basis"), (Width(hidden_size=16), r"16 wide and were \d+")]
)
def test_blocks_that_cannot_stand_in_for_each_other_are_null_with_the_reason_and_the_whole_pass_is_measured(pass_, why):
    model = tiny_model(num_hidden_layers=2)
    changed = pass_(copy.deepcopy(model), calibration=TOKENS).model
    found = damage(model, changed, [0, 1])
    assert re.search(why, found["reason"])
    assert found["blocks"] == [{"name": "model.layers.0"}, {"name": "model.layers.1"}]
    assert found["loss"]["rise"] == pytest.approx(
        next_token_loss(changed(TOKENS).logits, TOKENS) - next_token_loss(model(TOKENS).logits, TOKENS), abs=1e-5
    )


def test_padding_counts_nowhere():
    model, changed = rounded()
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    mask[1, 7:] = False
    other = torch.where(mask, TOKENS, 5)
    first, second = (
        damage(model, changed, [0, 1, 2], replace(WINDOWS, tokens=tokens, mask=mask)) for tokens in (TOKENS, other)
    )
    assert first["loss"] == pytest.approx(second["loss"])
    for one, two in zip(first["blocks"], second["blocks"], strict=True):
        assert one["error"] == pytest.approx(two["error"])
        assert one["kl"] == pytest.approx(two["kl"])


def test_an_encoder_has_errors_and_says_why_it_has_no_loss():
    model = tiny_model("bert")
    changed = copy.deepcopy(model)
    RTN(bits=2, group_size=16)(changed)
    found = damage(model, changed, list(range(len(ModelHandle.wrap(model).block_list()))))
    assert found["loss"]["value"] is None
    assert found["loss"]["reason"]
    assert all(block["error"] > 0 for block in found["blocks"])


def test_the_matrices_of_a_block_are_the_same_whether_packed_or_not():
    model, changed = rounded()
    assert list(matrices(changed.model.layers[0])) == list(matrices(model.model.layers[0]))
    conv = ModelHandle.wrap(tiny_model("gpt2")).block_list()[0].module
    assert set(matrices(conv)) == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}


def test_text_loss_is_that_of_the_whole_model_whatever_the_residency(tmp_path):
    folder = save_tiny(tmp_path / "m")
    sums = [text_loss(open_model(folder, residency=where), WINDOWS) for where in ("memory", "disk")]
    assert sums[0] == sums[1]
    expected = next_token_loss(open_model(folder).model(TOKENS).logits, TOKENS)
    assert sum(sums[0][0]) / sum(sums[0][1]) == pytest.approx(expected, rel=1e-5)


def test_a_stages_perplexity_is_the_metrics_own(tmp_path):
    from compress.measure.metrics import Perplexity

    model = open_model(save_tiny(tmp_path / "m"))
    nll, tokens = text_loss(model, WINDOWS)
    expected = Perplexity().compute(predictions=nll, references=tokens)
    found = stage_figures(model, WINDOWS)["perplexity"]
    assert {key: found[key] for key in ("value", "stderr", "n", "detail")} == {
        **expected, "value": pytest.approx(expected["value"]), "stderr": pytest.approx(expected["stderr"]),
        "detail": pytest.approx(expected["detail"]),
    }  # fmt: skip


def test_the_text_is_cut_to_the_stated_tokens():
    many = windows_from(tiny_tokens(samples=100, length=32), None)
    assert len(chosen(many)) == measuring.TOKENS // 32
    assert len(chosen(windows_from(tiny_tokens(samples=3, length=32), None))) == 3


def recipe(model, text, output, **benchmark):
    entry = {"source": str(text), "samples": 4, "length": 32}
    return {
        "model": str(model), "data": {"calibration": entry, "evaluation": {**entry, "samples": 6}},
        "passes": [{"wanda": {"sparsity": 0.5}}, {"gptq": {"bits": 3, "group_size": 16}}],
        "benchmark": {"metrics": ["weights_bytes"], **benchmark}, "output": str(output),
    }  # fmt: skip


@pytest.mark.usefixtures("unverified")
def test_a_run_states_damage_and_figures_of_each_stage_and_the_residency_changes_none(tiny_folder, text_file, tmp_path):
    found = []
    for where in ("memory", "disk"):
        run(recipe(tiny_folder, text_file, tmp_path / where) | {"residency": where})
        stages = json.loads((tmp_path / where / "report.json").read_text())["stages"]
        for stage in stages:
            assert stage["damage"].pop("seconds") >= 0
            assert stage["damage"]["text"] == {
                "source": str(text_file),
                "role": "evaluation",
                "windows": 6,
                "length": 32,
            }
            assert all(block["kl"] > 0 for block in stage["damage"]["blocks"])
        found.append([(stage["damage"], stage["measurements"]) for stage in stages])
    assert found[0] == found[1]
    (_, first), (_, last) = found[0]
    assert first["perplexity"]["n"] == 6
    assert first["weights_bytes"]["value"] > 0
    assert last == {}, "the last stage is what the benchmark measures"


@pytest.mark.usefixtures("unverified")
def test_a_pass_after_an_adapter_has_its_damage_and_one_that_leaves_it_on_disk_says_why_not(text_file, tmp_path):
    model = save_tiny(tmp_path / "grouped", "qwen3")  # layers that are not square: keys and values have fewer heads
    values = recipe(model, text_file, tmp_path / "memory", stages=False)
    lora = {"init_lora_weights": "repair", "tokens": 256, "batch_size": 4}
    other = tmp_path / "other.txt"
    other.write_text("".join(f"other words, number {n}, {n * n} of them\n" for n in range(80)))
    values["data"]["training"] = {**values["data"]["calibration"], "source": str(other)}
    values["passes"] = [{"rtn": {"bits": 3, "group_size": 16}}, {"repair": {"r": 2}}, {"lora": lora}]
    stages = run(values).stages
    assert [len(stage.damage["blocks"]) for stage in stages] == [3, 3, 3]
    on_disk = {**values, "passes": values["passes"][:2], "residency": "disk", "output": str(tmp_path / "disk")}
    rounded, repaired = run(on_disk).stages
    assert rounded.damage["blocks"]
    assert "adapter stands beside" in repaired.damage["reason"]


@pytest.mark.usefixtures("unverified")
def test_what_was_measured_survives_a_second_start_and_can_be_left_out(tiny_folder, text_file, tmp_path, monkeypatch):
    import compress.pipeline as pipeline

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_export", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(recipe(tiny_folder, text_file, tmp_path / "out"))
    monkeypatch.setattr(pipeline, "explain", lambda *_: pytest.fail("measured again"))
    assert all(stage.damage for stage in run(recipe(tiny_folder, text_file, tmp_path / "out")).stages)
    monkeypatch.undo()
    values = Recipe.from_dict(recipe(tiny_folder, text_file, tmp_path / "x", damage=False, stages=False))
    assert Wanted.of(values, tiny_folder) == Wanted(False, False)


def test_large_models_are_measured_when_asked_for(tiny_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("compress.explaining.SIZE_LIMIT", 10)
    absent, asked = (
        Recipe.from_dict(recipe(tiny_folder, text_file, tmp_path / "x", **said)) for said in ({}, {"damage": True})
    )
    assert Wanted.of(absent, tiny_folder) == Wanted(False, False)
    assert Wanted.of(asked, tiny_folder) == Wanted(True, False)
