"""The card of a written folder: figures that come again, how to load, the recipe, the licence."""

import re

import pytest
import yaml

from compress.recipe import Recipe
from compress.reports.card import auto_class, licence, model_card, rewrite_cards
from compress.reports.report import Export, Figure


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: grass\nlicense_link: LICENSE\n---\n# Base\n")
    return folder


@pytest.fixture
def recipe(base):
    return Recipe.from_dict({"model": str(base), "passes": [{"rtn": {"bits": 4}}]}, name="small")


def front(card):
    return yaml.safe_load(card.split("---")[1])


def test_the_card_has_the_reports_table_without_what_depends_on_the_machine(make_report, recipe, base):
    report = make_report()
    card = model_card(recipe, report.stages, base, "LlamaForCausalLM", report)
    assert "| Perplexity | 3.400 | 3.600 | +5.9 % | +5.3 to +6.5 % | worse |" in card
    assert "| Accuracy: two hop |" in card
    assert "Decode speed" not in card
    assert "Energy" not in card
    assert "3.1 × smaller; no measurable loss on 1 of 2 areas; facts lost 14.0 points" in card


def test_the_card_has_the_weights_in_memory_and_the_checks_of_exports(make_report, recipe, base):
    report = make_report()
    for figures, size in ((report.original, 11_600_000), (report.compressed, 3_700_000)):
        figures["resident_weights_bytes"] = Figure(value=size, unit="B", higher_is_better=False)
    report.exports = [
        Export(format="gguf", path="exports/gguf", bytes=10**6, by="llama.cpp", reloaded=True, allowed=0.05,
               kl_divergence=0.001, mean_logprob_difference=0.01)
    ]  # fmt: skip
    card = model_card(recipe, report.stages, base, "LlamaForCausalLM", report)
    assert "| Weights in memory | 11.60 MB | 3.700 MB |" in card
    assert "| exports/gguf | 1 MB | llama.cpp | 0.0010 (0.0025) | 0.010 (0.050) | – | – |" in card


def test_the_card_says_how_to_load_what_was_done_and_whose_licence_applies(make_report, recipe, base):
    card = model_card(recipe, make_report().stages, base, "BertForSequenceClassification")
    assert "AutoModelForSequenceClassification.from_pretrained" in card
    assert 'compress.load("path/to/this/folder")' in card
    shown = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1])
    assert shown["passes"][0]["rtn"]["bits"] == 4
    assert "`base`, and its licence applies to them as well: grass (LICENSE)" in card
    assert front(card)["license_name"] == "grass"
    assert str(base.parent) not in card, "where things lay is nobody else's business"
    assert "is in the report beside this folder" in card


def test_a_licence_that_is_not_stated_is_said_to_be_so(recipe, tmp_path):
    assert licence(tmp_path) == {}
    assert "does not state it" in model_card(recipe, [], tmp_path, "GPT2LMHeadModel")
    (tmp_path / "README.md").write_text("---\nlicense: [a\n---\n")
    assert licence(tmp_path) == {}


def test_a_hub_model_is_named_as_the_base():
    recipe = Recipe.from_dict({"model": "someone/some-model", "passes": []})
    assert front(model_card(recipe, [], recipe.base / "nowhere", "X"))["base_model"] == "someone/some-model"


def test_every_folder_of_the_run_gets_the_card_again(make_report, recipe, base, tmp_path):
    for place in ("model", "exports/packed"):
        (tmp_path / "run" / place).mkdir(parents=True)
        (tmp_path / "run" / place / "README.md").write_text("old")
        (tmp_path / "run" / place / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "run" / "exports" / "other").mkdir()
    rewrite_cards(tmp_path / "run", recipe, make_report(), base)
    cards = [(tmp_path / "run" / place / "README.md").read_text() for place in ("model", "exports/packed")]
    assert cards[0] == cards[1] == model_card(recipe, make_report().stages, base, "LlamaForCausalLM", make_report())
    assert not (tmp_path / "run" / "exports" / "other" / "README.md").exists()


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("GPT2LMHeadModel", "AutoModelForCausalLM"), ("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
     ("BertModel", "AutoModel")],
)  # fmt: skip
def test_the_class_that_loads_it_follows_from_the_architecture(architecture, name):
    assert auto_class(architecture) == name
