"""Every ready recipe does what it says, on a stand-in for its model and a little text."""

import json
from pathlib import Path

import pytest

import compress
from compress import answers
from compress.recipe import Recipe
from compress.testing import save_tiny, tiny_tokenizer

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), hidden_size=64, intermediate_size=128, num_hidden_layers=2)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A BERT that tells two classes apart, with a tokenizer."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_labels=2,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    path = tmp_path_factory.mktemp("labelled") / "text.jsonl"
    lines = [{"text": f"{'good' if n % 2 else 'bad'} film number {n}", "label": n % 2} for n in range(30)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def _reasoned(model, tokenizer, prompts, options):
    """What a teacher would write that can add: the stand-in cannot."""
    return [f" I see. So {eval(prompt.split()[1].removesuffix('=?'))}." for prompt in prompts]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipe_runs_and_its_result_is_verified(path, stand_in, classifier, labelled, tmp_path, monkeypatch):
    asked, text, model = Recipe.load(path), path.read_text(), stand_in
    overrides = ["data.calibration.samples=4", "data.calibration.length=32", "benchmark=false"]
    for role in ("calibration", "training", "evaluation"):
        if role == "calibration" or getattr(asked.data, role) is not None:
            overrides += [f"data.{role}.source=builtin:tiny", f"data.{role}.samples=8", f"data.{role}.length=32"]
    if "- quantize:" in text:
        overrides.append("passes.quantize.tokens=512")
    if "- distill:" in text:
        overrides += ["passes.distill.steps=2", "passes.distill.batch_size=4"]
    if "- depth:" in text:
        overrides.append("passes.depth.layers=1")
    if "answers:" in text:
        monkeypatch.setattr(answers, "generate_texts", _reasoned)
        overrides.append("passes.distill.answers.samples=8")
    if asked.benchmark is False:  # a classifier
        model = classifier
        overrides += [f"data.training.source={labelled}", "data.training.samples=null"]
    recipe = Recipe.load(path, overrides, model=str(model), output=str(tmp_path / "run"))
    report = compress.run(recipe)
    assert report.verified.reloaded
    assert [stage.pass_ for stage in report.stages] == [step.name for step in recipe.passes]
    least = [0 if step.structural else 0.9 for step in recipe.passes]  # what is removed is as much as was asked for
    assert all(stage.coverage > share for stage, share in zip(report.stages, least, strict=True))
