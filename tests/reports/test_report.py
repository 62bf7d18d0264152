import json
import math

import numpy as np
import pytest

from compress.errors import CompressError, StartError
from compress.reports.report import Comparison, Figure, Report, Stage, finite


def refuse_constant(name):
    raise AssertionError(f"{name} in report.json")


def test_report_json_has_the_keys_of_the_contract_in_its_order(make_report, tmp_path):
    path = make_report().write(tmp_path)
    data = json.loads(path.read_text(), parse_constant=refuse_constant)
    contract = [
        "schema_version", "recipe", "digest", "environment", "original", "stages", "compressed", "comparison",
        "goals", "verified",
    ]  # fmt: skip
    assert [key for key in data if key in contract] == contract
    assert data["schema_version"] == 1
    assert set(data["compressed"]["perplexity"]) == {"value", "unit", "higher_is_better", "stderr", "n", "runtime"}
    assert set(data["comparison"]["perplexity"]) == {"delta", "ratio", "ci_low", "ci_high", "verdict", "sentence"}
    assert set(data["stages"][0]) == {
        "pass", "options", "seconds", "predicted", "peak_memory_bytes", "coverage", "blocks", "measurements",
    }  # fmt: skip
    assert set(data["goals"][0]) == {"metric", "goal", "met", "value"}
    assert set(data["verified"]) == {"reloaded", "by", "max_logit_difference"}
    assert data["comparison"]["weights_bytes"]["ci_low"] is None


def test_what_could_not_be_measured_is_null_with_its_reason(make_report):
    data = json.loads(make_report().to_json())
    assert data["compressed"]["energy_joules_per_token"] == {
        "value": None,
        "reason": "this machine has no energy counter",
    }


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_numbers_that_are_not_finite_become_null_with_a_reason(bad, tmp_path):
    report = Report(
        original={"perplexity": Figure(value=bad, unit="perplexity", higher_is_better=False)},
        stages=[Stage(**{"pass": "rtn"}, blocks=[{"name": "b", "error": float(bad)}], measurements={"x": float(bad)})],
    )
    data = json.loads(report.write(tmp_path).read_text(), parse_constant=refuse_constant)
    assert data["original"]["perplexity"]["value"] is None
    assert "not a finite number" in data["original"]["perplexity"]["reason"]
    assert data["stages"][0]["blocks"][0]["error"]["value"] is None
    assert "not a finite number" in data["stages"][0]["measurements"]["x"]["reason"]
    assert "</html>" in (tmp_path / "report.html").read_text()


def test_a_report_reads_back_as_it_was_written(make_report, tmp_path):
    report = make_report()
    report.write(tmp_path)
    again = Report.read(tmp_path)
    assert again.to_json() == report.to_json()
    assert again.goals_met is False


def test_writing_leaves_three_files_and_nothing_else(make_report, tmp_path):
    make_report().write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]


def test_a_folder_without_report_and_a_damaged_report_are_refused(tmp_path):
    with pytest.raises(StartError, match="folder of a finished run"):
        Report.read(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(CompressError, match="is not a report"):
        Report.read(tmp_path)
    (tmp_path / "report.json").write_text('{"schema_version": 99}')
    with pytest.raises(StartError, match="schema_version 99"):
        Report.read(tmp_path)


def test_numpy_and_torch_numbers_and_paths_become_plain(tmp_path):
    import torch

    data = finite({"a": np.int64(3), "b": torch.tensor(2.5), "c": (1, tmp_path), 4: {"d": None}})
    assert data == {"a": 3, "b": 2.5, "c": [1, str(tmp_path)], "4": {"d": None}}


def test_an_unknown_verdict_is_refused():
    with pytest.raises(ValueError, match="verdict"):
        Comparison(verdict="maybe")
