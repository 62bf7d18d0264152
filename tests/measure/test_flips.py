import json

import pytest
import torch

from compress.measure.benchmark import measure_compressed, measure_original
from compress.measure.comparison import compare
from compress.measure.flips import SHOWN, flips, worst
from compress.measure.measurements import BenchmarkJob
from compress.reports.markdown import markdown
from compress.reports.report import Report
from compress.testing import tiny_tokenizer


def test_flips_count_what_changed_sides_with_its_text(measured):
    found = flips(measured.original, measured.compressed)
    before, after = (m.records["correct"] for m in (measured.original, measured.compressed))
    lost = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a > b]
    gained = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a < b]
    assert lost
    assert (found.right_to_wrong, found.wrong_to_right, found.items) == (len(lost), len(gained), 36)
    assert found.right_to_wrong == sum(counts["right_to_wrong"] for counts in found.areas.values())
    items = [item for area in measured.job.items.values() for item in area]
    texts = {json.dumps(items[i]) for i in lost}
    for flip in found.examples:
        if flip.change == "right_to_wrong":
            assert any(json.dumps(flip.text)[1:-1].split(" / ")[0] in text for text in texts)


def test_of_many_flips_some_of_each_area_are_shown(measured):
    from dataclasses import replace

    area = ["a"] * 300 + ["b"] * 3
    texts = [(f"question {i}", "yes") for i in range(303)]
    first = replace(measured.original, records={"correct": [1.0] * 303, "area": area}, item_texts=texts)
    second = replace(measured.original, records={"correct": [0.0] * 303, "area": area})
    found = flips(first, second)
    assert found.right_to_wrong == 303
    assert len(found.examples) == SHOWN
    assert sum(flip.area == "b" for flip in found.examples) == 3
    assert found.examples[1].text == "question 300"


def test_without_items_there_are_no_flips(measured):
    from dataclasses import replace

    assert flips(replace(measured.original, records={}), measured.compressed) is None


def test_the_worst_windows_are_those_of_the_largest_divergence_with_their_text(measured):
    found = worst(measured.compressed)
    records = measured.compressed.records
    means = records["kl"] / records["tokens"]
    assert [entry.window for entry in found] == (-means).argsort()[: len(found)].tolist()
    assert found[0].kl == pytest.approx(means.max())
    windows, tokenizer = measured.job.windows, tiny_tokenizer()
    for entry in found:
        assert entry.text == tokenizer.decode(windows[entry.window])[:400]
        own = records["token_kl"].reshape(12, 31)[entry.window]
        place = int(own.argmax()) + 1
        assert entry.token == tokenizer.decode(windows[entry.window, place : place + 1])
        assert entry.token_kl == pytest.approx(own.max())


def test_the_99th_percentile_is_that_of_the_tokens(measured):
    import numpy as np

    values = measured.compressed.records["token_kl"]
    assert len(values) == 12 * 31
    assert float(values.sum()) == pytest.approx(float(measured.compressed.records["kl"].sum()), rel=1e-5)
    want = np.sort(values)[int(np.ceil(0.99 * len(values))) - 1]
    assert measured.compressed.figures["kl_divergence_p99"].value == pytest.approx(float(want))
    compared = measured.comparison["kl_divergence_p99"]
    assert compared.verdict == "worse"
    assert compared.sentence.startswith("1 token of 100 is ")


def test_padding_counts_neither_in_the_percentile_nor_in_the_worst_texts(pair, windows, tmp_path, same_process):
    mask = torch.ones_like(windows, dtype=torch.bool)
    mask[3, 10:] = False
    job = BenchmarkJob(windows=windows, mask=mask, metrics=("kl_divergence", "kl_divergence_p99", "bits_per_byte"))
    first = measure_original(str(pair[0]), job=job, workdir=tmp_path)
    second = measure_compressed(pair[1], str(pair[0]), first, job=job, workdir=tmp_path)
    assert len(second.records["token_kl"]) == 12 * 31 - 22
    for entry in worst(second):
        if entry.window == 3:
            assert entry.text == tiny_tokenizer().decode(windows[3, :10])
    assert second.records["text_bytes"][3] <= 9


def test_the_report_holds_flips_and_worst_texts_and_shows_them_in_words(measured, tmp_path):
    report = Report(
        original=measured.original.figures, compressed=measured.compressed.figures,
        comparison=compare(measured.original, measured.compressed), flips=flips(measured.original, measured.compressed),
        worst=worst(measured.compressed),
    )  # fmt: skip
    report.write(tmp_path)
    again = Report.read(tmp_path)
    assert again.flips == report.flips
    assert again.worst == report.worst
    text = markdown(again)
    assert "## Items that changed sides" in text
    assert "## Text on which the models differ most" in text
    assert again.comparison["accuracy/pairs"].p_adjusted is not None
    assert Report().to_json().count("flips") == 0
