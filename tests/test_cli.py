"""The command line: light, exit codes, one clear message for each mistake, nothing left behind by it."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import forks
import pytest
import yaml
from transformers import AutoTokenizer

import compress
from compress.cli import main
from compress.registry import PASSES
from compress.testing import save_tiny

ROOT = Path(__file__).parents[1]


def call(capsys, *arguments):
    """(exit code, stdout, stderr) of the program, in this process."""
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code or 0
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.parametrize("code", ["import compress", "import compress.cli", "from compress.cli import commands"])
def test_importing_the_package_imports_no_torch(code):
    check = (
        f"{code}; import sys; heavy = {{'torch', 'transformers', 'pydantic', 'numpy'}} & set(sys.modules); print(heavy)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_the_program_silences_advice_of_bitsandbytes_which_training_imports():
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    try:
        logger.setLevel(logging.NOTSET)
        with pytest.raises(SystemExit):
            main(["run", "no such recipe"])
        assert not logger.isEnabledFor(logging.WARNING)
        assert logger.isEnabledFor(logging.ERROR)
    finally:
        logger.setLevel(before)


def test_help_runs_without_torch_and_lists_the_commands_of_the_contract():
    script = (
        "import sys, runpy\nsys.argv = ['compress', '--help']\ntry: runpy.run_module('compress', run_name='__main__')"
    )
    script += "\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip().endswith("False")
    for command in ("run", "plan", "benchmark", "generate", "report", "doctor", "passes", "schema", "init"):
        assert f"  {command} " in done.stdout
    assert "  fit " not in done.stdout


@pytest.fixture
def recipe(tiny_folder, text_file, tmp_path):
    """Writes a recipe file with changes, and returns its path."""

    def write(**changes):
        values = {
            "model": str(tiny_folder),
            "data": {"calibration": {"source": str(text_file), "samples": 8, "length": 32}},
            "passes": [{"gptq": {"bits": 4, "group_size": 16}}],
            "benchmark": False,
            "output": str(tmp_path / "out"),
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**values, **changes}))
        return tmp_path / "recipe.yaml"

    return write


def test_run_prints_the_reports_path_last_and_exits_0(capsys, recipe, tmp_path):
    code, out, err = call(capsys, "run", recipe(), "--quiet", "--set", "passes.gptq.bits=8")
    assert code == 0, err
    path = Path(out.strip().splitlines()[-1])
    assert path == (tmp_path / "out" / "report.json").resolve()
    assert json.loads(path.read_text())["stages"][0]["options"]["bits"] == 8


BAD = {
    "unknown key": ({"passs": []}, 2, ["passs", "passes"]),
    "unknown pass": ({"passes": [{"gtpq": {}}]}, 2, ["gtpq", "gptq"]),
    "unknown option": ({"passes": [{"gptq": {"bit": 4}}]}, 2, ["bit", "bits"]),
    "wrong type": ({"passes": [{"gptq": {"bits": "four"}}]}, 2, ["four", "2, 3, 4, 5, 6, 8"]),
    "out of range": ({"passes": [{"gptq": {"damping": 7}}]}, 2, ["damping", "7"]),
    "impossible order": ({"passes": [{"gptq": {"group_size": 16}}, "wanda"]}, 2, ["wanda", "gptq", "quantized"]),
    "missing model": ({"model": "./nowhere"}, 2, ["nowhere"]),
    "missing text": ({"data": {"calibration": "nowhere.jsonl"}}, 2, ["nowhere.jsonl"]),
    "no text given": ({"data": {}}, 2, ["data.calibration"]),
    "group that does not divide": ({"passes": [{"gptq": {"group_size": 5}}]}, 2, ["group", "32"]),
    "pattern that does not divide": ({"passes": [{"magnitude": {"pattern": "2:5"}}]}, 2, ["5"]),
    "no such target": ({"passes": [{"rtn": {"group_size": 16, "targets": ["nope"]}}]}, 2, ["q_proj"]),
    "budget too small": ({"memory": "1MB"}, 2, ["memory"]),
    "too few weights reached": (
        {"passes": [{"rtn": {"group_size": 16, "targets": ["*.k_proj"]}}]}, 1, ["min_coverage", "up_proj"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_recipe_gets_one_clear_message_and_leaves_no_folder(capsys, recipe, tmp_path, case):
    changes, expected, words = BAD[case]
    code, out, err = call(capsys, "run", recipe(**changes), "--quiet")
    assert code == expected, err
    assert "Traceback" not in err
    assert out == ""
    for word in words:
        assert word in err, f"{word!r} is not said: {err}"
    assert not (tmp_path / "out" / "model").exists()
    if expected == 2:
        assert not (tmp_path / "out").exists()


TEXTS = {
    "empty": (b"", "no text"),
    "too short": (b'{"text": "a bee"}\n', "tokens"),
    "not UTF-8": (b'{"text": "abc"}\n\xff\xfe\x00\n', "UTF-8"),
    "malformed": (b'{"text": "abc"}\n{"text": \n', "bad.jsonl:2"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_bad_calibration_text_is_named_and_leaves_no_folder(capsys, recipe, tmp_path, case):
    data, word = TEXTS[case]
    (tmp_path / "bad.jsonl").write_bytes(data)
    code, _, err = call(capsys, "run", recipe(data={"calibration": str(tmp_path / "bad.jsonl")}), "--quiet")
    assert code in (1, 2), err
    assert word in err
    assert "bad.jsonl" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_truncated_checkpoint_fails_with_its_name(capsys, recipe, tmp_path, tiny_folder):
    import shutil

    shutil.copytree(tiny_folder, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    code, _, err = call(capsys, "run", recipe(model=str(tmp_path / "cut")), "--quiet")
    assert code == 1, err
    assert "model.safetensors" in err
    assert not (tmp_path / "out").exists()


def test_a_pickled_checkpoint_is_refused(capsys, recipe, tmp_path, tiny_folder):
    import shutil

    shutil.copytree(tiny_folder, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    code, _, err = call(capsys, "run", recipe(model=str(tmp_path / "pickled")), "--quiet")
    assert code == 1, err
    assert "pickle" in err
    assert not (tmp_path / "out").exists()


def test_a_hub_model_without_a_hub_says_that_the_hub_is_needed(capsys, recipe, tmp_path):
    code, _, err = call(capsys, "run", recipe(model="nobody/nothing-here"), "--quiet")
    assert code == 2, err
    assert "hub" in err
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(recipe):
    program = "import runpy; runpy.run_module('compress', run_name='__main__')"
    assert "Traceback" in forks.python(program, "run", recipe(passs=[]), "--debug").stderr
    assert "Traceback" not in forks.python(program, "run", recipe(passs=[])).stderr


def test_usage_errors_exit_with_2(capsys):
    assert call(capsys, "run")[0] == 2
    assert call(capsys, "rnu")[0] == 2
    assert call(capsys, "run", "nowhere.yaml")[0] == 2


def test_a_missed_goal_exits_with_3_and_still_leaves_the_model(capsys, recipe, text_file, tmp_path):
    data = {
        "calibration": {"source": str(text_file), "samples": 8, "length": 32},
        "evaluation": {"source": str(text_file), "samples": 8, "length": 32},
    }
    benchmark = {"metrics": ["perplexity", "weights_bytes"], "goals": {"weights_bytes": "1kB"}}
    code, out, err = call(capsys, "run", recipe(data=data, benchmark=benchmark), "--quiet")
    assert code == 3, err
    report = json.loads(Path(out.strip().splitlines()[-1]).read_text())
    assert report["goals"] == [
        {
            "metric": "weights_bytes",
            "goal": "1kB",
            "met": False,
            "value": report["compressed"]["weights_bytes"]["value"],
        }
    ]
    assert (tmp_path / "out" / "model" / "config.json").exists()
    assert report["original"]["perplexity"]["value"] > 1


@pytest.mark.slow
def test_goals_of_every_kind_are_judged_and_the_missed_one_is_red_in_the_report(capsys, recipe, text_file, tmp_path):
    """Relative to the original up and down, in points, and a speed; the missed one decides the exit code."""
    items = tmp_path / "items.jsonl"
    items.write_text('{"good": "a bee can", "bad": "can bee a", "area": "order"}\n' * 4)
    entry = {"source": str(text_file), "samples": 4, "length": 32}
    goals = {
        "perplexity": "+900%", "accuracy": "-100pt", "weights_bytes": "-20%", "decode_tokens_per_second": "+900000%",
    }  # fmt: skip
    benchmark = {"goals": goals, "tasks": [str(items)], "damage": False, "stages": False}
    path = recipe(data={"calibration": entry, "evaluation": entry}, benchmark=benchmark)
    code, out, err = call(capsys, "run", path)
    assert code == 3, err
    folder = Path(out.strip().splitlines()[-1]).parent
    found = json.loads((folder / "report.json").read_text())["goals"]
    assert {goal["metric"]: goal["met"] for goal in found} == {
        "perplexity": True, "accuracy": True, "weights_bytes": True, "decode_tokens_per_second": False,
    }  # fmt: skip
    page = (folder / "report.html").read_text()
    assert page.count("<li>Goal missed: decode speed +900000%, reached") == 1
    assert page.count('<tr class="missed">') == 1
    assert "Goal missed: decode speed" in " ".join(err.split())
    assert "| Accuracy: order |" in (folder / "model" / "README.md").read_text()
    assert call(capsys, "run", path)[0] == 3, "a finished run is asked again"


def test_a_goal_missed_by_the_second_model_of_a_benchmark_exits_with_3(capsys, monkeypatch, tmp_path, tiny_folder):
    from compress.measure import benchmark as stage
    from compress.reports.report import Figure, Report

    def measured(folders, *rest, **options):
        figure = {"unit": "bits", "higher_is_better": False}
        return Report(original={"bits_per_weight": Figure(value=32, **figure)},
                      compressed={"bits_per_weight": Figure(value=4, **figure)})  # fmt: skip

    monkeypatch.setattr(stage, "benchmark", measured)
    for goal, expected in (("-80%", 0), ("3", 3)):
        said = ["--set", f"benchmark.goals={{bits_per_weight: {goal}}}", "--output", tmp_path / "b", "--quiet"]
        assert call(capsys, "benchmark", tiny_folder, tiny_folder, *said)[0] == expected
        (found,) = json.loads((tmp_path / "b" / "report.json").read_text())["goals"]
        assert found["met"] is (expected == 0)


def test_plan_as_json_reads_no_weight(capsys, recipe, tmp_path, tiny_folder):
    import shutil

    shutil.copytree(tiny_folder, tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    code, out, err = call(capsys, "plan", recipe(model=str(tmp_path / "bare")), "--json")
    assert code == 0, err
    assert json.loads(out)["weights_bytes"] > 0


def test_passes_lists_all_and_describes_one(capsys):
    code, out, _ = call(capsys, "passes")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == PASSES.names()
    code, out, _ = call(capsys, "passes", "gptq")
    assert "group_size" in out
    assert call(capsys, "passes", "gtpq")[0] == 2


def test_schema_is_json_with_the_passes_options(capsys):
    code, out, _ = call(capsys, "schema")
    assert code == 0
    assert "damping" in json.dumps(json.loads(out))


def test_init_prints_a_recipe_that_loads(capsys, tmp_path):
    from compress.recipe import Recipe

    code, out, _ = call(capsys, "init", "builtin:tiny")
    assert code == 0
    (tmp_path / "starter.yaml").write_text(out)
    assert Recipe.load(tmp_path / "starter.yaml").model == "builtin:tiny"


def test_doctor_names_the_machine_and_the_versions(capsys):
    code, out, _ = call(capsys, "doctor")
    assert code == 0
    assert "torch: 2." in out
    assert "GPU: " in out
    assert "Packed layers" in out
    assert "int8" in out


def test_doctor_says_what_computes_the_layers_of_a_folder(capsys, tmp_path):
    folder = save_tiny(tmp_path / "tiny")
    code, out, _ = call(capsys, "doctor", folder)
    assert code == 0
    assert "float32: torch (22 layers" in out


def test_generate_refuses_what_is_missing_damaged_or_not_to_be_had_in_a_sentence(
    capsys, recipe, tmp_path, monkeypatch, unverified
):
    from compress.nn import cpu

    assert call(capsys, "run", recipe(), "--quiet", "--set", "benchmark=false")[0] == 0
    folder = tmp_path / "out"
    monkeypatch.setattr(cpu, "why_not_int8", lambda layer=None: "this processor lacks AVX-512 VNNI")
    code, _, err = call(capsys, "generate", folder, "--prompt", "a", "--activations", "int8")
    assert code == 2
    assert "this processor lacks AVX-512 VNNI" in err
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, _, err = call(capsys, "generate", folder, "--prompt", "a")
    assert code == 1
    assert "model.safetensors" in err
    assert len(err.strip().splitlines()) == 1
    code, _, err = call(capsys, "generate", tmp_path / "no" / "such" / "folder", "--prompt", "a")
    assert code == 2
    assert len(err.strip().splitlines()) == 1


def test_generate_continues_a_prompt_from_a_packed_folder(capsys, recipe, tmp_path):
    assert call(capsys, "run", recipe(), "--quiet")[0] == 0
    code, out, err = call(capsys, "generate", tmp_path / "out", "--prompt", "a bee can", "--tokens", "5")
    assert code == 0, err
    assert "tokens/s" in err
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    ids = tokenizer("a bee can", return_tensors="pt")["input_ids"]
    written = compress.load(tmp_path / "out").generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert out.rstrip("\n") == tokenizer.decode(written, skip_special_tokens=True).rstrip("\n")
