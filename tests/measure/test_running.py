"""Other runtimes beside transformers, and what an interrupted benchmark finds when it is run again."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from compress.comparing import benchmark
from compress.errors import CompressError, RecipeError, StartError
from compress.measure import scoring, worker
from compress.measure.benchmark import measure_compressed, measure_original
from compress.measure.comparison import compare, original_figures
from compress.measure.measurements import BenchmarkJob, SpeedSettings
from compress.measure.running import artifact
from compress.measure.runtimes import Runtime, Transformers
from compress.progress import Progress, Step
from compress.recipe import Recipe
from compress.registry import RUNTIMES
from compress.reports.report import Report

SPEED = SpeedSettings(prompt=8, decode_prompt=4, new_tokens=3, rounds=6, warmup=0, batches=(2,))


class Toy(Runtime):
    """Opens `exports/toy`, a copy of the model, with transformers."""

    name, exports, absent = "toy", ("toy",), None

    def missing(self):
        return self.absent

    def can_load(self, folder):
        return False

    def open(self, folder, *, threads, device):
        engine = Transformers().open(folder, threads=threads, device=device)
        engine.runtime, engine.read_bytes = "toy 1.0", None
        return engine


@pytest.fixture
def toy(monkeypatch):
    module = ModuleType("toy_runtime")
    module.Toy = Toy
    monkeypatch.setitem(sys.modules, "toy_runtime", module)
    monkeypatch.setitem(RUNTIMES.table, "toy", "toy_runtime:Toy")


@pytest.fixture
def jobs(monkeypatch):
    """Jobs are done in this process; the kinds of those that were done. `jobs.stop_at` interrupts one."""

    class Done(list):
        stop_at = None

    done = Done()

    def run_child(command, *, out=None, **_):
        kind = json.loads(Path(command[-1]).read_text())["kind"]
        if len(done) + 1 == done.stop_at:
            done.stop_at = None
            raise KeyboardInterrupt
        if worker.main(command[-1]) != 0:
            raise CompressError(json.loads((out / "result.json").read_text())["error"])
        done.append(kind)

    monkeypatch.setattr("compress.measure.jobs.run_child", run_child)
    monkeypatch.setattr(worker, "die_with_parent", lambda: None)
    monkeypatch.setattr("compress.measure.benchmark.BESIDE_LIMIT", 0)  # loading is for one thread at a time
    monkeypatch.setattr("compress.measure.speed.gc.collect", lambda: 0)
    monkeypatch.setattr("compress.measure.bandwidth.BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr("compress.measure.bandwidth.last_cache_bytes", lambda: 0)
    return done


@pytest.fixture
def run_folder(pair, tmp_path):
    """A run's folder: the second model, and an export of it that is the same."""
    shutil.copytree(pair[1], tmp_path / "run" / "model")
    shutil.copytree(pair[1], tmp_path / "run" / "exports" / "toy")
    return tmp_path / "run"


@pytest.mark.usefixtures("toy", "jobs")
def test_another_runtime_has_rows_of_its_own(pair, run_folder, windows, tmp_path):
    job = BenchmarkJob(windows=windows, threads=1, speed=SPEED, runtimes=("transformers", "toy"), watts=10.0)
    original = measure_original(str(pair[0]), job=job, workdir=tmp_path / "work")
    found = measure_compressed(run_folder, str(pair[0]), original, job=job, workdir=tmp_path / "work")
    figures, comparison = found.figures, compare(original, found)
    for name in ("decode_tokens_per_second", "first_token_seconds", "prefill_tokens_per_second"):
        for variant in ("toy", "toy, batch 2", "batch 2"):
            figure = figures[f"{name}/{variant}"]
            assert figure.n == 6
            assert figure.runtime == ("transformers" if variant == "batch 2" else "toy 1.0")
            assert comparison[f"{name}/{variant}"].ci_low is not None
    assert original_figures(original, found)["decode_tokens_per_second/toy"].runtime == "transformers"
    assert figures["kl_divergence/toy"].value == pytest.approx(0, abs=1e-9)
    assert figures["top1_agreement/toy"].value == 1
    assert "not from the original" in comparison["kl_divergence/toy"].sentence
    assert figures["peak_memory_bytes/toy"].runtime == "toy 1.0"
    assert figures["kv_cache_bytes_per_token/toy"].value == figures["kv_cache_bytes_per_token"].value
    size = sum(file.stat().st_size for file in (run_folder / "exports" / "toy").iterdir())
    assert figures["decode_tokens_per_second/toy"].detail["read_bytes"] == size
    assert figures["decode_tokens_per_second"].detail["bandwidth_share"] > 0
    energy = figures["energy_joules_per_token/toy"]
    assert energy.detail.get("estimated") is not True or energy.unit == "J/token, estimated"
    report = Report(original=original_figures(original, found), compressed=figures, comparison=comparison)
    assert json.loads(report.to_json())["compressed"]["decode_tokens_per_second/toy"]["value"] > 0


@pytest.mark.usefixtures("toy", "jobs")
def test_a_runtime_without_its_export_has_null_rows_with_the_reason(pair, windows, tmp_path):
    job = BenchmarkJob(threads=1, speed=SPEED, runtimes=("toy",), metrics=("decode_tokens_per_second",))
    original = measure_original(str(pair[0]), job=job, workdir=tmp_path)
    found = measure_compressed(pair[1], str(pair[0]), original, job=job, workdir=tmp_path)
    assert "add toy to export" in found.figures["decode_tokens_per_second/toy"].reason
    assert found.figures["decode_tokens_per_second"].value > 0


@pytest.mark.usefixtures("toy", "jobs")
def test_a_runtime_that_fails_leaves_the_others_figures(pair, run_folder, tmp_path):
    (run_folder / "exports" / "toy" / "model.safetensors").write_bytes(b"\0" * 40)
    job = BenchmarkJob(
        threads=1, speed=SPEED, runtimes=("toy",), metrics=("decode_tokens_per_second", "peak_memory_bytes")
    )
    original = measure_original(str(pair[0]), job=job, workdir=tmp_path / "work")
    found = measure_compressed(run_folder, str(pair[0]), original, job=job, workdir=tmp_path / "work")
    for name in ("decode_tokens_per_second", "peak_memory_bytes"):
        assert "cannot load" in found.figures[f"{name}/toy"].reason
        assert found.figures[name].value > 0


@pytest.mark.usefixtures("toy")
def test_an_artifact_is_the_export_beside_the_model(run_folder, pair):
    assert artifact(run_folder / "model", "toy") == run_folder / "exports" / "toy"
    assert artifact(pair[0], "toy") is None
    assert artifact(pair[0], "transformers") == pair[0]


OVERRIDES = ("benchmark.metrics=[parameters, peak_memory_bytes, decode_tokens_per_second]", "benchmark.rounds=1",
             "benchmark.new_tokens=2", "benchmark.warmup=0")  # fmt: skip


@pytest.mark.parametrize("stop_at", range(1, 7))
def test_an_interrupted_benchmark_does_each_job_once(pair, jobs, tmp_path, monkeypatch, stop_at):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    models = [str(folder) for folder in pair]
    jobs.stop_at = stop_at
    with pytest.raises(KeyboardInterrupt):
        benchmark(models, overrides=OVERRIDES, output=tmp_path / "out", device="cpu")
    report = benchmark(models, overrides=OVERRIDES, output=tmp_path / "out", device="cpu")
    assert sorted(jobs) == sorted(["quality", "memory"] * 2 + ["bandwidth", "speed"])
    assert report.comparison["decode_tokens_per_second"].delta is not None
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.json", "report.md", "report.html"}


def test_a_second_benchmark_measures_anew_but_for_the_originals_figures(pair, jobs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    models = [str(folder) for folder in pair]
    benchmark(models, overrides=OVERRIDES, device="cpu")
    assert len(jobs) == 6
    benchmark(models, overrides=OVERRIDES, device="cpu")
    assert sorted(jobs[6:]) == ["bandwidth", "memory", "quality", "speed"]
    assert not list((tmp_path / "cache" / "compress" / "benchmarks").iterdir())


@pytest.mark.usefixtures("jobs")
def test_figures_are_shown_as_they_come(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    said = []

    class Told(Progress):
        def note(self, text):
            said.append(text)

    benchmark([str(folder) for folder in pair], overrides=OVERRIDES, device="cpu", progress=Told())
    assert [text.partition(":")[0] for text in said] == ["original", "compressed", "compressed"]
    assert "Peak memory" in said[1]
    assert "Decode speed" in said[2]


def test_several_models_are_compared_with_the_first(pair, jobs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    models = [str(pair[0]), str(pair[1]), str(pair[0])]
    report = benchmark(models, overrides=[*OVERRIDES, "benchmark.metrics=[weights_bytes]"], device="cpu")
    assert report.comparison["weights_bytes"].verdict == "no_difference"
    assert [other.model for other in report.others] == [str(pair[0])]


def test_a_folder_that_is_no_model_is_refused_before_anything_is_measured(pair, jobs, tmp_path):
    with pytest.raises(StartError, match=r"no config\.json"):
        benchmark([str(pair[0]), str(tmp_path)], device="cpu")
    assert jobs == []


@pytest.mark.parametrize(
    ("benchmark", "sentence"),
    [
        ({"runtimes": ["toy"]}, "toy cannot run here: install compress\\[toy\\]"),
        ({"runtimes": ["nothing"]}, "unknown runtime"),
        ({"batches": [0]}, "benchmark.batches"),
        ({"prompt_tokens": [0]}, "benchmark.prompt_tokens"),
        ({"rounds": 0}, "benchmark.rounds"),
        ({"watts": 0}, "benchmark.watts"),
        ({"goals": {"decode_tokens_per_second/batch 4": "+10%"}}, "batch 4 is not measured"),
        ({"goals": {"weights_bytes/batch 4": "1MB"}}, "unknown metric"),
    ],
)
@pytest.mark.usefixtures("toy")
def test_what_cannot_be_measured_is_refused_when_the_recipe_is_read(benchmark, sentence, monkeypatch):
    monkeypatch.setattr(Toy, "absent", "install compress[toy].")
    monkeypatch.setattr(Toy, "exports", ())
    with pytest.raises(RecipeError, match=sentence):
        Recipe.from_dict({"model": "builtin:tiny", "passes": [{"rtn": {}}], "benchmark": benchmark})


@pytest.mark.usefixtures("toy")
def test_a_runtime_whose_export_is_not_written_is_refused():
    values = {"model": "builtin:tiny", "passes": [{"rtn": {}}], "benchmark": {"runtimes": ["toy"]}}
    with pytest.raises(RecipeError, match="add toy to export"):
        Recipe.from_dict(values)
    Recipe.from_dict({**values, "passes": []})  # of models that are there, the exports may be


@pytest.mark.usefixtures("toy")
def test_goals_may_name_settings_and_runtimes():
    goals = {"decode_tokens_per_second/toy, batch 4": "+10%", "peak_memory_bytes/toy": "2GB"}
    values = {"runtimes": ["toy"], "batches": [1, 4], "goals": goals}
    recipe = Recipe.from_dict({"model": "builtin:tiny", "benchmark": values})
    assert [goal.kind for goal in recipe.benchmark.parsed_goals()] == ["relative", "absolute"]


def test_a_measurement_is_known_by_the_content_of_its_model(pair, jobs, tmp_path):
    job = BenchmarkJob(threads=1, metrics=("parameters",))
    folder = tmp_path / "model"
    shutil.copytree(pair[0], folder)
    measure_original(str(folder), job=job, workdir=tmp_path / "work")
    measure_original(str(folder), job=job, workdir=tmp_path / "work")
    assert jobs == ["quality"]
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved, copy_function=shutil.copy2)
    measure_original(str(moved), job=job, workdir=tmp_path / "work")
    assert jobs == ["quality"]
    shutil.copyfile(pair[1] / "model.safetensors", moved / "model.safetensors")
    measure_original(str(moved), job=job, workdir=tmp_path / "work")
    measure_original(str(moved), job=dataclasses.replace(job, threads=2), workdir=tmp_path / "work")
    assert jobs == ["quality"] * 3


@pytest.mark.usefixtures("jobs")
def test_a_job_tells_how_far_it_is(pair, windows, items, tmp_path, monkeypatch):
    told = []
    for module in (worker, scoring):
        monkeypatch.setattr(module, "tell", lambda job, *said: told.append((job["kind"], *said)))
    job = BenchmarkJob(windows=windows, items=items, threads=1, speed=SPEED)
    measure_original(str(pair[0]), job=job, workdir=tmp_path, speed=True)
    kinds = {kind for kind, *_ in told}
    assert kinds == {"quality", "speed"}
    assert ("quality", len(windows), len(windows), "windows of text") in told
    assert ("quality", 24, 36, "items: exact") in told
    assert [said[1:3] for said in told if said[0] == "speed"] == [(done, 12) for done in range(1, 13)]


def test_what_a_job_tells_moves_the_step_of_whoever_waits(tmp_path):
    from compress.measure.jobs import _tell

    class Seen(Step):
        def at(self, *said):
            self.said = said

    seen = Seen()
    _tell(tmp_path / "progress", seen)  # nothing is there yet
    worker.tell({"progress": str(tmp_path / "progress")}, 1, 4, "a")
    worker.tell({"progress": str(tmp_path / "progress")}, 2, 4, "b")
    _tell(tmp_path / "progress", seen)
    assert seen.said == (2, 4, "b")
