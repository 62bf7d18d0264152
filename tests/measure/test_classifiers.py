"""Models that classify texts: accuracy, F1 and Matthews correlation, from lines of text + label."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from compress.errors import CompressError
from compress.measure.areas import predicted_classes
from compress.measure.benchmark import measure_compressed, measure_original
from compress.measure.comparison import compare
from compress.measure.flips import flips
from compress.preparation import benchmark_job, cut_texts
from compress.recipe import Recipe
from compress.testing import tiny_model, tiny_tokenizer

NAMES = ["bad", "fair", "good"]
QUALITY = ("accuracy", "f1", "matthews_correlation")


def classifier(folder, seed=0, names=NAMES, noise=0.0):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=96, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=40, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)},
        pad_token_id=0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(20).add_(torch.randn(parameter.shape), alpha=noise)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifiers")
    first = classifier(folder / "a", noise=0.5)
    classifier(folder / "b", seed=1, noise=2.0)
    words = ["bee", "fig", "hen", "ink", "jam", "kit", "lamp", "moss", "nut", "oak"]
    model = AutoModelForSequenceClassification.from_pretrained(first).eval()
    lines = []
    for i in range(40):
        text = f"the {words[i % 10]} is {words[(3 * i + i // 10) % 10]} {i}"
        ids = torch.tensor([tiny_tokenizer()(text)["input_ids"]])
        bos = torch.tensor([[1]])
        with torch.no_grad():
            said = int(model(torch.cat([bos, ids], 1)).logits.argmax())
        lines.append({"text": text, "label": NAMES[said if i % 4 else (said + 1) % 3]})
    (folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "plain.jsonl").write_text("".join(json.dumps({"text": line["text"]}) + "\n" for line in lines) * 20)
    return folder


def job_of(folder, text="eval.jsonl", **benchmark):
    values = {"model": str(folder / "a"), "data": {"evaluation": str(folder / text)}, "benchmark": benchmark}
    recipe = Recipe.from_dict(values)
    from compress.opening import read_config, read_tokenizer

    config, tokenizer = read_config(folder / "a"), read_tokenizer(folder / "a")
    texts = cut_texts(recipe.data, ["evaluation"], tokenizer, config, recipe.base, 0, folder / "a")
    return benchmark_job(recipe, "cpu", texts["evaluation"])


def test_labelled_texts_stand_alone_and_have_their_class(folders):
    job = job_of(folders)
    assert len(job.windows) == len(job.labels) == 40
    assert job.mask is not None
    assert job.class_names == dict(enumerate(NAMES))
    assert {"f1", "matthews_correlation"} <= set(job.names())


@pytest.mark.usefixtures("same_process")
def test_a_classifier_has_accuracy_f1_and_matthews_with_paired_differences(folders, tmp_path):
    job = job_of(folders, metrics=[*QUALITY, "perplexity"])
    first = measure_original(str(folders / "a"), job=job, workdir=tmp_path)
    assert first.figures["accuracy"].value == pytest.approx(0.75)
    assert first.figures["accuracy"].n == 40
    assert 0.5 < first.figures["f1"].value < 0.9
    assert first.figures["perplexity"].value is None
    second = measure_compressed(folders / "b", str(folders / "a"), first, job=job, workdir=tmp_path)
    found = compare(first, second)
    for name in QUALITY:
        assert second.figures[name].value < first.figures[name].value
        assert found[name].verdict == "worse"
        assert found[name].ci_low <= found[name].delta <= found[name].ci_high < 0
    changed = flips(first, second)
    assert changed.right_to_wrong - changed.wrong_to_right == round(-40 * found["accuracy"].delta)
    assert changed.examples[0].text.startswith("the ")
    assert changed.examples[0].answer in NAMES


@pytest.mark.usefixtures("same_process")
def test_text_without_labels_measures_no_accuracy_and_says_why(folders, tmp_path):
    job = job_of(folders, "plain.jsonl", metrics=[*QUALITY, "parameters"])
    assert job.labels is None
    found = measure_original(str(folders / "a"), job=job, workdir=tmp_path)
    for name in QUALITY:
        assert "no labels" in found.figures[name].reason
    assert found.figures["parameters"].value > 0


@pytest.mark.usefixtures("same_process")
def test_a_language_model_has_no_f1_and_says_why(pair, windows, tmp_path):
    from compress.measure.measurements import BenchmarkJob

    job = BenchmarkJob(windows=windows, metrics=("f1",), threads=1)
    found = measure_original(str(pair[0]), job=job, workdir=tmp_path)
    assert "does not classify" in found.figures["f1"].reason


@pytest.mark.usefixtures("same_process")
def test_a_model_of_other_classes_is_not_compared(folders, tmp_path):
    classifier(tmp_path / "other", names=["no", "yes"])
    job = job_of(folders, metrics=["accuracy"])
    first = measure_original(str(folders / "a"), job=job, workdir=tmp_path / "work")
    with pytest.raises(CompressError, match="does not tell the same classes as the original"):
        measure_compressed(tmp_path / "other", str(folders / "a"), first, job=job, workdir=tmp_path / "work")


def test_a_label_that_is_no_class_is_named_with_its_line(folders, tmp_path):
    (tmp_path / "eval.jsonl").write_text('{"text": "a", "label": "good"}\n{"text": "b", "label": "bda"}\n')
    with pytest.raises(CompressError, match=r"eval\.jsonl:2: label: \"bda\" is no class of this model"):
        job_of(folders, tmp_path / "eval.jsonl")


def test_classes_are_the_same_one_by_one_and_in_padded_batches(folders):
    model = AutoModelForSequenceClassification.from_pretrained(folders / "a").eval()
    job = job_of(folders)
    together = predicted_classes(model, job.windows, job.mask)
    alone = [
        int(predicted_classes(model, window[None, keep], None))
        for window, keep in zip(job.windows, job.mask, strict=True)
    ]
    assert together.tolist() == alone


def test_a_decoder_without_a_padding_token_classifies_texts_one_by_one():
    from transformers import LlamaForSequenceClassification

    config = tiny_model("llama").config
    config.num_labels, config.pad_token_id = 3, None
    model = LlamaForSequenceClassification(config).eval()
    tokens = torch.tensor([[5, 6, 7, 0], [5, 6, 7, 8]])
    mask = torch.tensor([[True, True, True, False], [True] * 4])
    with torch.no_grad():
        want = [int(model(torch.tensor([row])).logits.argmax()) for row in ([5, 6, 7], [5, 6, 7, 8])]
    assert predicted_classes(model, tokens, mask).tolist() == want


def test_a_job_of_a_classifier_is_kept_by_its_labels_too(folders):
    job = job_of(folders)
    assert replace(job, labels=None).names() != job.names()
