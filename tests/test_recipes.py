"""Every ready recipe does what it says, on a stand-in for its model and a little text."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import BertForSequenceClassification

import compress
from compress import answers
from compress.recipe import Recipe
from compress.registry import FORMATS
from compress.testing import BYTE_VOCABULARY, byte_tokenizer, save_tiny, tiny_model, tiny_tokenizer

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


#: Recipes whose folder is reloaded in a process of its own: one of each kind of folder, since that takes seconds.
RELOADED = ("w4-gptq", "w8a8-smoothquant", "prune-width-30", "vocab-domain", "lora-recover", "prune-bert-classifier")
#: What has to be there for recipes that export for another program.
ENGINES = {"gguf-q4": "llama_cpp", "onnx-int4": "onnxruntime_genai"}


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), hidden_size=64, intermediate_size=128, num_hidden_layers=2)


@pytest.fixture(scope="module")
def exportable(tmp_path_factory):
    """A stand-in with a tokenizer that other programs can read."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    folder = save_tiny(tmp_path_factory.mktemp("exportable"), vocab_size=BYTE_VOCABULARY, **shape)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A tiny encoder with two classes, and texts that a word of each decides."""
    folder = tmp_path_factory.mktemp("classifier")
    config = tiny_model("bert").config
    config.num_labels = 2
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    draw = random.Random(0)
    lines = []
    for _ in range(96):
        label = draw.randrange(2)
        lines.append(json.dumps({"text": " ".join(draw.sample(WORDS[label], 3)), "label": label}))
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


WORDS = (["awful", "bad", "dull", "grim", "poor"], ["fine", "good", "joy", "nice", "sweet"])


def test_the_classifiers_recipe_learns_the_classes_and_its_result_is_verified(labelled, tmp_path):
    overrides = [f"data.training.source={labelled / 'texts.jsonl'}", "data.training.samples=96"]
    overrides += ["passes.lora.epochs=10", "passes.lora.learning_rate=1e-2"]
    path = next(path for path in RECIPES if path.stem == "classifier-lora")
    recipe = Recipe.load(path, overrides, model=str(labelled), output=str(tmp_path / "run"))
    report = compress.run(recipe)
    said = report.stages[0].measurements["held_out"]
    assert said["after"]["accuracy"] == said["merged"]["accuracy"] >= 0.9
    assert said["before"]["f1"] < 0.8 < said["after"]["f1"]
    assert report.verified.max_logit_difference < 1e-3


def _reasoned(model, tokenizer, prompts, options):
    """What a teacher would write that can add: the stand-in cannot."""
    return [f" I see. So {eval(prompt.split()[1].removesuffix('=?'))}." for prompt in prompts]


@pytest.mark.parametrize("path", [p for p in RECIPES if p.stem != "classifier-lora"], ids=lambda path: path.stem)
def test_the_recipe_runs_and_changes_what_it_says(path, stand_in, labelled, tmp_path, monkeypatch, request):
    if path.stem not in RELOADED:
        request.getfixturevalue("unverified")
    if path.stem in ENGINES:
        pytest.importorskip(ENGINES[path.stem], reason=f"{ENGINES[path.stem]} is not installed")
    asked, text = Recipe.load(path), path.read_text()
    model = labelled if "classifier" in path.stem else stand_in
    if asked.export:
        model = request.getfixturevalue("exportable")
    overrides = ["data.calibration.samples=4", "data.calibration.length=32", "benchmark=false"]
    for role in ("calibration", "training", "evaluation"):
        if role == "calibration" or getattr(asked.data, role) is not None:
            overrides += [f"data.{role}.source=builtin:tiny", f"data.{role}.samples=8", f"data.{role}.length=32"]
    for name in ("quantize", "lora"):
        if f"- {name}:" in text:
            overrides.append(f"passes.{name}.tokens=512")
    for place, step in enumerate(asked.passes):
        if step.name == "distill":
            overrides += [f"passes.{place}.distill.steps=2", f"passes.{place}.distill.batch_size=4"]
    if path.stem == "prune-distill-quantize":  # the stand-in has two blocks
        overrides.append("passes.depth.layers=1")
    if path.stem == "shrink-60":  # and 96 tokens
        overrides.append("passes.vocab.keep=80")
    if path.stem == "tiny-champion":  # and 64 channels
        overrides.append("passes.gptq.group_size=16")
    if "answers:" in text:
        monkeypatch.setattr(answers, "generate_texts", _reasoned)
        overrides.append("passes.distill.answers.samples=8")
    if path.stem == "distill-classifier":
        overrides += [f"data.training.source={labelled / 'texts.jsonl'}", "data.training.samples=null"]
    recipe = Recipe.load(path, overrides, model=str(model), output=str(tmp_path / "run"))
    report = compress.run(recipe)
    assert report.verified.reloaded
    assert [export.format for export in report.exports if export.reloaded] == [
        name for name in recipe.export if FORMATS.get(name).runtime
    ]
    assert [stage.pass_ for stage in report.stages] == [step.name for step in recipe.passes]
    least = [0 if step.structural else 0.9 for step in recipe.passes]  # what is removed is as much as was asked for
    assert all(stage.coverage > share for stage, share in zip(report.stages, least, strict=True))
