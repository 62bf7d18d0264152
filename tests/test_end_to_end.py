"""Training a rounded model as a whole: what it brings, what stays as it was, and that a killed run loses nothing."""

import copy

import pytest
import torch

import compress
from compress import training
from compress.errors import RecipeError, StartError
from compress.maths.divergence import kl_divergence
from compress.nn.quant_linear import QuantLinear
from compress.pipeline import run
from compress.recipe import Recipe
from compress.self_text import write_text
from compress.testing import save_tiny, tiny_model, tiny_tokens

TEXT = tiny_tokens(64, 32)
SMALL = {"tokens": 32 * 32 * 30, "batch_size": 32}


def _rounded(symmetric=True):
    model = tiny_model("llama")
    compress.RTN(bits=3, group_size=16, symmetric=symmetric)(model)
    return model


def _divergence(model):
    with torch.no_grad():
        return kl_divergence(model(TEXT).logits, tiny_model("llama")(TEXT).logits).item()


def _codes(model):
    return [module.weight_packed.clone() for module in model.modules() if isinstance(module, QuantLinear)]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("cls", [compress.EfficientQAT, compress.LLMQAT])
def test_training_brings_the_model_nearer_to_the_original_by_a_fifth(cls, symmetric):
    model = _rounded(symmetric)
    before = _divergence(model)
    result = cls(**SMALL)(model, training=TEXT, original=tiny_model("llama"))
    assert _divergence(model) < 0.8 * before
    assert result.measurements["steps"] == 30
    assert all(layer["change"] > 0 for block in result.blocks for layer in block["layers"].values())


def test_efficientqat_leaves_the_codes_and_llm_qat_does_not():
    model = _rounded()
    before = _codes(model)
    trained = copy.deepcopy(model)
    compress.EfficientQAT(**SMALL)(trained, training=TEXT, original=tiny_model("llama"))
    assert all(torch.equal(a, b) for a, b in zip(before, _codes(trained), strict=True))
    compress.LLMQAT(**SMALL)(model, training=TEXT, original=tiny_model("llama"))
    assert not all(torch.equal(a, b) for a, b in zip(before, _codes(model), strict=True))


def test_zeros_of_a_pruned_model_stay_through_efficientqat_and_llm_qat_refuses_it():
    model = tiny_model("llama")
    compress.Magnitude(sparsity=0.5)(model)
    compress.RTN(bits=4, group_size=16, symmetric=False)(model)
    zeros = [m.dequantize() == 0 for m in model.modules() if isinstance(m, QuantLinear)]
    assert sum(int(z.sum()) for z in zeros) > 10_000
    compress.EfficientQAT(**SMALL)(model, training=TEXT, original=tiny_model("llama"))
    after = [m.dequantize() for m in model.modules() if isinstance(m, QuantLinear)]
    assert all(bool((weight[zero] == 0).all()) for weight, zero in zip(after, zeros, strict=True))
    with pytest.raises(StartError, match="llm_qat takes quantized weights, and this model's are sparse"):
        compress.LLMQAT(**SMALL)(model, training=TEXT, original=tiny_model("llama"))


def test_the_best_preset_from_python_learns_from_the_model_as_it_came():
    model = tiny_model("llama")
    result = compress.Quantize(preset="best", bits=3, group_size=16, tokens=SMALL["tokens"])(
        model, calibration=TEXT[:16], training=TEXT
    )
    losses = result.measurements["llm_qat"]["losses"]
    assert losses[-1]["loss"] < losses[0]["loss"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "llm_qat needs training text"),
        ({"training": TEXT}, "llm_qat learns from the original model"),
    ],
)
def test_what_is_missing_is_named(given, message):
    with pytest.raises(StartError, match=message):
        compress.LLMQAT(**SMALL)(_rounded(), **given)


def test_a_model_that_is_not_rounded_is_refused():
    with pytest.raises(StartError, match="has none: round it first"):
        compress.LLMQAT(**SMALL)(tiny_model("llama"), training=TEXT, original=tiny_model("llama"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def _values(folder, output, **more):
    text = {"source": "builtin:tiny", "samples": 8, "length": 32}
    passes = [{"rtn": {"bits": 3, "group_size": 16}}, {"llm_qat": {"tokens": 8 * 32 * 6, "batch_size": 8}}]
    return {
        "model": str(folder), "data": {"training": text}, "passes": passes, "benchmark": False,
        "output": str(output), **more,
    }  # fmt: skip


@pytest.mark.parametrize("options", [({}, {}), ({"grid": "trellis"}, {"dampening": 0.2})])
def test_a_run_killed_in_training_ends_with_the_same_bytes(options, folder, tmp_path, monkeypatch, unverified):
    def values(output):
        recipe = _values(folder, output)
        for step, more in zip(recipe["passes"], options, strict=True):
            next(iter(step.values())).update(more)
        return recipe

    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    run(values(tmp_path / "whole"))
    done = training._Trainer.training_step
    calls = []

    def step(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return done(self, *args, **kwargs)

    monkeypatch.setattr(training._Trainer, "training_step", step)
    with pytest.raises(KeyboardInterrupt):
        run(values(tmp_path / "killed"))
    run(values(tmp_path / "killed"))
    assert len(calls) == 4 + 3
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "killed/model" / name).read_bytes() == (tmp_path / "whole/model" / name).read_bytes()


def test_it_is_refused_with_blocks_on_disk_when_the_recipe_is_read(folder, tmp_path):
    with pytest.raises(RecipeError, match=r"passes.1.llm_qat: llm_qat trains the whole model at once: use residency"):
        Recipe.from_dict(_values(folder, tmp_path, residency="disk"))


def test_evaluation_text_is_not_trained_on(folder, tmp_path):
    text = {"source": "builtin:tiny", "samples": 8, "length": 32, "seed": 1}
    (tmp_path / "text.txt").write_text("one day the small fox ran to the old tree. " * 40)
    text = {"source": str(tmp_path / "text.txt"), "length": 32}
    values = _values(folder, tmp_path / "out", data={"training": text, "evaluation": text}, benchmark={})
    with pytest.raises(StartError, match=r"data.training: 100% of the evaluation text is training text too"):
        run(values)


def test_a_model_writes_whole_windows_the_same_for_a_seed_and_keeps_them(tmp_path):
    model, first = tiny_model("llama"), torch.arange(3, 13)
    kept = tmp_path / "written.safetensors"
    written = write_text(lambda: model, first, 12, seed=5, title="test", kept=kept)
    assert written.shape == (10, 12)
    assert torch.equal(written[:, 0], first)
    assert torch.equal(write_text(lambda: model, first, 12, seed=5, title="test"), written)
    assert not torch.equal(write_text(lambda: model, first, 12, seed=6, title="test"), written)
    assert torch.equal(write_text(lambda: model, first, 12, seed=6, title="test", kept=kept), written)


def test_generated_text_is_trained_on_beside_the_text_at_hand(monkeypatch):
    seen = []
    inner = training.train

    def spy(objective, groups, windows, *args, **options):
        seen.append(windows.tokens)
        return inner(objective, groups, windows, *args, **options)

    monkeypatch.setattr(training, "train", spy)
    compress.LLMQAT(tokens=512, generated=320)(_rounded(), training=TEXT, original=tiny_model("llama"))
    assert seen[0].shape == (64 + 10, 32)
    assert torch.equal(seen[0][:64], TEXT)


@pytest.mark.parametrize("before", ["smoothquant", "fp8", {"bnb": {"format": "int8"}}])
def test_layers_that_are_not_packed_integers_are_refused_by_the_plan(before, folder, tmp_path):
    values = _values(folder, tmp_path / "out")
    values["data"]["calibration"] = values["data"]["training"]
    values["passes"][0] = before
    with pytest.raises(StartError, match=r"llm_qat trains packed integers .* is stored in another way"):
        compress.plan(Recipe.from_dict(values))


def test_a_run_killed_after_training_keeps_the_trained_norms_outside_the_blocks(
    folder, tmp_path, monkeypatch, unverified
):
    run(_values(folder, tmp_path / "whole"))

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("compress.pipeline._export", fail)
        with pytest.raises(KeyboardInterrupt):
            run(_values(folder, tmp_path / "killed"))
    run(_values(folder, tmp_path / "killed"))
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()
