"""A whole run: what it leaves, what it refuses, and what happens when it is killed."""

import errno
import json
import os

import forks
import pytest
import torch
import yaml

import compress
from compress.checkpoint import SafetensorsWriter, TensorSource
from compress.errors import CompressError, StartError
from compress.pipeline import run
from compress.recipe import Recipe
from compress.testing import save_tiny


def recipe(model, text, output, **changes):
    values = {
        "model": str(model),
        "data": {"calibration": {"source": str(text), "samples": 8, "length": 32}},
        "passes": [{"wanda": {"sparsity": 0.5}}, {"gptq": {"bits": 4, "group_size": 16}}],
        "benchmark": False,
        "output": str(output),
    }
    return {**values, **changes}


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(tiny_folder, text_file, tmp_path_factory):
    """One uninterrupted run, and its report."""
    output = tmp_path_factory.mktemp("run") / "out"
    return output, run(recipe(tiny_folder, text_file, output))


def test_a_run_leaves_a_model_folder_a_report_and_no_intermediate_stage(finished):
    output, report = finished
    assert {"model", "report.json", "report.md", "report.html"} <= {path.name for path in output.iterdir()}
    assert not (output / ".compress" / "stages").exists()
    names = {path.name for path in (output / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "compress.json"} <= names
    assert not [path for path in output.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    assert report.verified.reloaded
    assert report.verified.max_logit_difference <= 1e-3


def test_the_folder_holds_packed_codes_whose_pruned_weights_are_exactly_zero(finished):
    source = TensorSource(finished[0] / "model")
    name = "model.layers.0.mlp.up_proj"
    assert f"{name}.weight_packed" in source
    assert f"{name}.weight" not in source
    model = compress.load(finished[0])
    for _, module in model.named_modules():
        if type(module).__name__ == "QuantLinear":
            zeros = (module.dequantize() == 0).float().mean(dim=1)
            assert (zeros >= 0.5).all()


def test_the_history_is_stored_with_the_model(finished):
    history = json.loads((finished[0] / "model" / "compress.json").read_text())["history"]
    assert [entry["pass"] for entry in history] == ["wanda", "gptq"]
    assert history[1]["options"]["bits"] == 4
    assert compress.load(finished[0] / "model").compress_history == history


def test_the_report_has_a_stage_a_pass_with_predicted_beside_measured(finished):
    stages = json.loads((finished[0] / "report.json").read_text())["stages"]
    assert [stage["pass"] for stage in stages] == ["wanda", "gptq"]
    for stage in stages:
        assert stage["coverage"] == 1.0
        assert len(stage["blocks"]) == 3
        assert all(block["error"] > 0 for block in stage["blocks"])
        assert stage["seconds"] > 0
        assert stage["peak_memory_bytes"] is not None
        assert stage["predicted"]["peak_memory_bytes"] > 0
    written = sum(path.stat().st_size for path in (finished[0] / "model").glob("*.safetensors"))
    assert stages[-1]["predicted"]["weights_bytes"] == written


def test_a_finished_run_is_not_done_again_and_says_so(finished, tiny_folder, text_file, monkeypatch):
    output, report = finished
    monkeypatch.setattr("compress.pipeline.open_model", lambda *a, **k: pytest.fail("opened the model again"))
    again = run(recipe(tiny_folder, text_file, output))
    assert again.digest == report.digest


def test_the_same_recipe_elsewhere_gives_the_same_bytes_whatever_the_residency(
    finished, tiny_folder, text_file, tmp_path
):
    run(recipe(tiny_folder, text_file, tmp_path / "disk", residency="disk"))
    assert content(tmp_path / "disk" / "model") == content(finished[0] / "model")


def test_a_changed_recipe_on_an_old_folder_is_refused_with_what_changed(finished, tiny_folder, text_file):
    output, _ = finished
    before = content(output)
    passes = [{"wanda": {"sparsity": 0.5}}, {"gptq": {"bits": 3, "group_size": 16}}]
    with pytest.raises(StartError, match=r"passes.*bits.*4.*3.*--fresh"):
        run(recipe(tiny_folder, text_file, output, passes=passes))
    assert content(output) == before


@pytest.mark.slow
def test_fresh_starts_over_with_a_changed_recipe(tiny_folder, text_file, tmp_path):
    passes = [{"rtn": {"bits": 8, "group_size": 16}}]
    run(recipe(tiny_folder, text_file, tmp_path / "out", passes=passes))
    first = content(tmp_path / "out" / "model")
    passes = [{"rtn": {"bits": 2, "group_size": 16}}]
    run(recipe(tiny_folder, text_file, tmp_path / "out", passes=passes), fresh=True)
    assert content(tmp_path / "out" / "model")["model.safetensors"] != first["model.safetensors"]


def test_a_folder_with_other_files_is_refused_and_left_as_it_was(tiny_folder, text_file, tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(StartError, match="not a run's"):
        run(recipe(tiny_folder, text_file, tmp_path))
    assert content(tmp_path) == {"mine.txt": b"keep me"}


def test_a_second_run_on_a_folder_in_use_is_refused(tiny_folder, text_file, tmp_path):
    from compress.pipeline import as_recipe
    from compress.workspace import Workspace

    values = as_recipe(recipe(tiny_folder, text_file, tmp_path / "out"))
    script = (
        "import sys; from compress.pipeline import run\n"
        "try: run(sys.argv[1])\nexcept Exception as error: print(type(error).__name__, error)"
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values.canonical()))
    with Workspace.open(tmp_path / "out", values, {}):
        done = forks.python(script, tmp_path / "recipe.yaml")
    assert "CompressError" in done.stdout
    assert "in use by another run" in done.stdout


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "Inf")])
def test_weights_that_are_not_finite_fail_before_anything_is_written(tiny_folder, text_file, tmp_path, value, word):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_folder, tmp_path / "bad")
    tensors = load_file(tmp_path / "bad" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, tmp_path / "bad" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressError, match=rf"model\.layers\.1\.mlp\.up_proj\.weight.*{word}") as caught:
        run(recipe(tmp_path / "bad", text_file, tmp_path / "out"))
    assert caught.value.exit_code == 1
    assert not (tmp_path / "out").exists()


def test_a_full_disk_ends_clearly_and_the_run_continues_when_there_is_room(
    finished, tiny_folder, text_file, tmp_path, monkeypatch
):
    written = []
    original = SafetensorsWriter.write

    def write(self, name, tensor):
        written.append(name)
        if len(written) == 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, name, tensor)

    from compress import checkpoint

    def full(self, name, tensor):
        with checkpoint.disk_errors(self.path):
            write(self, name, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsWriter, "write", full)
        with pytest.raises(CompressError, match="disk is full"):
            run(recipe(tiny_folder, text_file, tmp_path / "out"))
    assert not list((tmp_path / "out").rglob("*.partial"))
    run(recipe(tiny_folder, text_file, tmp_path / "out"))
    assert content(tmp_path / "out" / "model") == content(finished[0] / "model")


#: Where the process kills itself, in this order, one place a try: amid a block's tensors, just after a block is kept,
#: before the folder gets its name, and when all is written but nothing verified.
KILLER = """
import os, signal, sys
place = sys.argv[2]
def kill_at(owner, name, times):
    original, count = getattr(owner, name), [0]
    def wrapped(*args, **kwargs):
        count[0] += 1
        if count[0] == times:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(owner, name, wrapped)
import compress.checkpoint, compress.workspace, compress.formats.folder, compress.pipeline
if place == "tensor": kill_at(compress.checkpoint.SafetensorsWriter, "write", 13)
if place == "block": kill_at(compress.workspace.Stage, "keep", 3)
if place == "second pass": kill_at(compress.workspace.Stage, "keep", 3)
if place == "folder": kill_at(compress.formats.folder, "replace_folder", 1)
if place == "verify": kill_at(compress.pipeline, "verify", 1)
compress.pipeline.run(sys.argv[1])
"""


def test_a_run_killed_again_and_again_ends_with_the_bytes_of_an_uninterrupted_one(
    finished, tiny_folder, text_file, tmp_path
):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(tiny_folder, text_file, tmp_path / "out")))
    for place in ("tensor", "block", "second pass", "folder", "verify"):
        done = forks.python(KILLER, path, place)
        assert done.returncode == -9, f"{place}: {done.stderr}"
        assert not (tmp_path / "out" / "report.json").exists()
    first = next((tmp_path / "out" / ".compress" / "stages").glob("00-*"))
    assert not list(first.glob("*.safetensors"))
    seconds = json.loads((first / "complete.json").read_text())["seconds"]
    done = forks.python(KILLER, path, "never")
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "out" / "model") == content(finished[0] / "model")
    reports = [json.loads((folder / "report.json").read_text()) for folder in (tmp_path / "out", finished[0])]
    blocks = [[stage["blocks"] for stage in report["stages"]] for report in reports]
    assert blocks[0] == blocks[1]
    assert reports[0]["stages"][0]["seconds"] == seconds, "a finished pass was done again"


@pytest.mark.slow
def test_gpt2_is_written_unpacked_with_the_codes_beside_it(text_file, tmp_path):
    folder = save_tiny(tmp_path / "gpt2", "gpt2")
    report = run(recipe(folder, text_file, tmp_path / "out", passes=[{"rtn": {"bits": 4, "group_size": 16}}]))
    assert any("Conv1D" in note for note in report.notes)
    assert (tmp_path / "out" / "exports" / "packed" / "packed.safetensors").exists()
    model = compress.load(tmp_path / "out")
    assert sum(type(module).__name__ == "QuantLinear" for module in model.modules()) == 12


def test_a_missing_gpu_is_said_before_the_work(tiny_folder, text_file, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(StartError, match="no GPU"):
        run(recipe(tiny_folder, text_file, tmp_path / "out", device="cuda"))


def test_a_recipe_object_a_mapping_and_a_file_are_taken_alike(tiny_folder, text_file, tmp_path):
    values = recipe(tiny_folder, text_file, tmp_path / "out")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    from compress.pipeline import as_recipe

    digests = {as_recipe(given).digest() for given in (values, Recipe.from_dict(values), str(tmp_path / "recipe.yaml"))}
    assert len(digests) == 1


def test_the_test_suite_is_offline():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
