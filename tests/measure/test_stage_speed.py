"""Stages are timed as they would be run, in turn with the original; where they cannot be, the run goes on."""

import json

import pytest

from compress.errors import CompressError
from compress.explaining import Wanted
from compress.measure import stage_speed as timing
from compress.measure.measurements import BenchmarkJob
from compress.measure.stage_speed import DECODE, stage_speed, write_stage
from compress.model import ModelHandle
from compress.opening import open_model
from compress.passes.rtn import RTN
from compress.pipeline import run
from compress.progress import Progress
from compress.recipe import Recipe
from compress.recipe.sections import Runtime
from compress.reports.points import quality_plots
from compress.reports.report import Report
from compress.testing import save_tiny, tiny_model, tiny_tokens

JOB = BenchmarkJob(windows=tiny_tokens(), threads=1)


@pytest.fixture
def jobs(same_process, monkeypatch):
    """The requests of the jobs that were done, with what stood in the stage's folder; all in this process."""
    found = []
    own = timing.run_job

    def noted(request, workdir, **more):
        folders = sorted(path.parent.name for path in (workdir / "stage").rglob("config.json"))
        found.append({**request, "folders": folders})
        return own(request, workdir, **more)

    monkeypatch.setattr(timing, "run_job", noted)
    monkeypatch.setattr("compress.measure.speed.gc.collect", lambda: 0)
    return found


def test_a_packed_stage_is_run_from_its_packed_weights_and_nothing_of_it_stays(jobs, tmp_path):
    folder = save_tiny(tmp_path / "m")
    handle = open_model(folder)
    RTN(bits=4, group_size=32).run(handle, _context())
    figure = stage_speed(handle, folder, JOB, Runtime(), tmp_path / "work", Progress())
    assert figure.value > 0
    assert (figure.unit, figure.n, figure.runtime) == ("tokens/s", timing.SETTINGS.rounds, "compress.load")
    assert figure.detail["ratio"] == pytest.approx(figure.value / figure.detail["original"])
    (job,) = jobs
    assert [engine["folder"] for engine in job["engines"]] == [str(folder), str(tmp_path / "work" / "stage" / "model")]
    assert list((tmp_path / "work").iterdir()) == []


def test_what_cannot_be_packed_in_the_folder_stands_beside_it_as_after_a_run(tmp_path):
    handle = ModelHandle.wrap(tiny_model("gpt2"))
    RTN(bits=4, group_size=32).run(handle, _context())
    write_stage(handle, tmp_path / "s", Runtime(activations="int8"))
    assert (tmp_path / "s" / "model" / "config.json").is_file()
    history = json.loads((tmp_path / "s" / "exports" / "packed" / "compress.json").read_text())
    assert history["runtime"] == {"activations": "int8"}


def test_a_stage_that_cannot_be_run_is_null_with_the_reason(jobs, tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "bert", "bert")
    found = stage_speed(open_model(folder), folder, JOB, Runtime(), tmp_path / "work", Progress())
    assert (found.value, found.reason) == (None, "the model does not generate text")

    def fails(*_, **__):
        raise CompressError("no engine opens it")

    monkeypatch.setattr(timing, "run_job", fails)
    found = stage_speed(open_model(folder), folder, JOB, Runtime(), tmp_path / "work", Progress())
    assert (found.value, found.reason) == (None, "not measured: no engine opens it")
    assert list((tmp_path / "work").iterdir()) == []


def _context():
    from compress.passes.base import Context

    return Context(min_coverage=0.0)


def recipe(model, text, output, **benchmark):
    entry = {"source": str(text), "samples": 4, "length": 32}
    return {
        "model": str(model), "data": {"calibration": entry, "evaluation": {**entry, "samples": 6}},
        "passes": [{"magnitude": {"sparsity": 0.5}}, {"wanda": {"sparsity": 0.6}}, {"rtn": {"group_size": 16}}],
        "benchmark": {"metrics": ["perplexity", DECODE], "damage": False, "rounds": 1, **benchmark},
        "output": str(output),
    }  # fmt: skip


@pytest.mark.usefixtures("unverified")
def test_every_stage_but_the_last_is_timed_once_though_the_run_is_killed_and_is_a_point_of_the_plot(
    jobs, tiny_folder, text_file, tmp_path, monkeypatch
):
    import compress.pipeline as pipeline

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("compress.measure.benchmark.BESIDE_LIMIT", 0)
    monkeypatch.setattr("compress.measure.bandwidth.BUFFER_BYTES", 1 << 20)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_export", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(recipe(tiny_folder, text_file, tmp_path / "out"))
    assert len(jobs) == 2
    run(recipe(tiny_folder, text_file, tmp_path / "out"))
    assert len(jobs) == 2
    report = Report.read(tmp_path / "out")
    first, second, last = (stage.measurements for stage in report.stages)
    assert first[DECODE]["value"] > 0
    assert second[DECODE]["detail"]["ratio"] > 0
    assert DECODE not in last
    latency = quality_plots(report)[1]
    assert latency.title == "Quality against writing speed"
    assert latency.svg.count('class="mark"') == 4
    assert "1 magnitude" in latency.svg
    assert "times the original&#39;s" in latency.svg or "times the original's" in latency.svg


@pytest.mark.parametrize("said", [{"metrics": ["perplexity"]}, {"stages": False}])
@pytest.mark.usefixtures("unverified")
def test_no_stage_is_timed_where_speed_is_not_measured_or_stages_are_left_out(
    said, jobs, tiny_folder, text_file, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("compress.pipeline.measure_original", lambda *_, **__: None)
    run(recipe(tiny_folder, text_file, tmp_path / "out", **said))
    assert jobs == []


def test_stages_are_timed_unless_they_are_left_out(tiny_folder, text_file, tmp_path):
    values = Recipe.from_dict(recipe(tiny_folder, text_file, tmp_path))
    assert Wanted.of(values, tiny_folder).stages
