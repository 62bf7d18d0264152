# ruff: noqa: E501 (tables of messages read best a case a line)
from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, field_validator, model_validator

from compress.errors import CompressError, RecipeError, StartError
from compress.passes.base import Pass, PassResult
from compress.recipe import DataEntry, Recipe, changes_since, differences, parse_goal, parse_size
from compress.recipe.document import parse_yaml
from compress.registry import FORMATS, PASSES, RUNTIMES
from compress.starter import starter_recipe


class Rounding(Pass):
    """A toy pass that leaves quantized weights and needs no text."""

    name: ClassVar[str] = "rounding"
    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "sparse"})
    leaves: ClassVar[str] = "quantized"

    bits: Literal[2, 3, 4, 8] = Field(4, description="Bits of each weight.")
    damping: float = Field(0.01, gt=0, le=1)
    symmetric: bool = True
    skip: tuple[str, ...] = ()
    targets: list[str] | None = None

    @field_validator("damping")
    @classmethod
    def _damping(cls, value: float) -> float:
        if value == 0.5:
            raise ValueError("one half is unlucky")
        return value

    def run(self, model: Any, context: Any) -> PassResult:
        raise NotImplementedError


class Zeroing(Rounding):
    """Needs text, leaves sparse weights."""

    name: ClassVar[str] = "zeroing"
    leaves: ClassVar[str] = "sparse"
    needs_calibration: ClassVar[bool] = True

    pattern: str | None = None
    sparsity: float | None = None

    @model_validator(mode="after")
    def _one(self) -> Zeroing:
        if self.pattern and self.sparsity:
            raise ValueError("give sparsity or pattern, not both")
        return self


class Merging(Rounding):
    """Takes nothing but an adapter; leaves the model as it is."""

    name: ClassVar[str] = "merging"
    accepts: ClassVar[frozenset[str]] = frozenset({"adapter"})
    leaves: ClassVar[str] = "same"


class Polishing(Rounding):
    name: ClassVar[str] = "polishing"
    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "quantized"})
    leaves: ClassVar[str] = "dense"


class Exacting(Rounding):
    name: ClassVar[str] = "exacting"
    accepts: ClassVar[frozenset[str]] = frozenset({"dense"})


@pytest.fixture(autouse=True)
def toy_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = {cls.name: f"{__name__}:{cls.__name__}" for cls in (Rounding, Zeroing, Merging, Polishing, Exacting)}
    monkeypatch.setattr(PASSES, "table", table)
    monkeypatch.chdir(tmp_path)


def written(tmp_path: Path, text: str | bytes, name: str = "r.yaml") -> Path:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def tiny(*passes: Any, **values: Any) -> dict[str, Any]:
    return {"model": "builtin:tiny", "passes": list(passes), **values}


def refusal(values: Any, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(values, overrides=overrides)
    assert caught.value.exit_code == 2
    assert "http" not in str(caught.value)
    return str(caught.value)


# Reading


def test_defaults_are_those_of_the_contract(tmp_path: Path) -> None:
    recipe = Recipe.load(written(tmp_path, "model: org/model\npasses: [rounding]\n", "one.yaml"))
    assert (recipe.seed, recipe.dtype, recipe.device, recipe.residency) == (0, "auto", "auto", "memory")
    assert recipe.min_coverage == 0.5
    assert recipe.name == "one"
    assert recipe.base == tmp_path
    assert recipe.output == str(tmp_path / "runs" / "one")
    assert recipe.passes == (Rounding(),)
    assert recipe.benchmark
    assert recipe.benchmark.metrics is None
    assert recipe.benchmark.runtimes == ("transformers",)
    assert recipe.data.calibration is None
    assert recipe.memory_bytes is None


@pytest.mark.parametrize("entry", ["rounding", {"rounding": None}, {"rounding": {}}, {"rounding": {"bits": 4}}])
def test_a_pass_is_written_in_any_of_three_ways(entry: Any) -> None:
    assert Recipe.from_dict(tiny(entry)).passes == (Rounding(bits=4),)


def test_pass_objects_serve_as_entries_in_python() -> None:
    assert Recipe.from_dict(tiny(Rounding(bits=3))).passes == (Rounding(bits=3),)


def test_unquoted_patterns_small_numbers_and_signed_goals_read_as_meant(tmp_path: Path) -> None:
    text = """
model: builtin:tiny
passes:
- zeroing: {pattern: 2:4, damping: 1e-4}
benchmark:
  goals: {perplexity: +0.5, accuracy: -1pt, weights_bytes: 2GB, kl_divergence: 0.1}
"""
    recipe = Recipe.load(written(tmp_path, text))
    step = recipe.passes[0]
    assert isinstance(step, Zeroing)
    assert (step.pattern, step.damping) == ("2:4", 1e-4)
    assert recipe.benchmark
    assert recipe.benchmark.goals == {
        "perplexity": "+0.5",
        "accuracy": "-1pt",
        "weights_bytes": "2GB",
        "kl_divergence": 0.1,
    }
    assert [goal.kind for goal in recipe.benchmark.parsed_goals()] == ["points", "points", "absolute", "absolute"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2:4", "2:4"), ("190:20:30", "190:20:30"), ("1e-4", 1e-4), ("1.", 1.0), (".5", 0.5), ("-3", -3), ("+3", "+3"),
        ("0x1F", 31), ("0o17", 15), ("017", 17), ("yes", "yes"), ("on", "on"), ("true", True), ("", None), ("~", None),
        ("2024-01-01", "2024-01-01"), ("'4'", "4"), ("1_000", "1_000"), (".inf", ".inf"), ("1e999", "1e999"),
        ("!!str 4", "4"), ("[1, a]", [1, "a"]), ("{a: 2:4}", {"a": "2:4"}),
    ],
)  # fmt: skip
def test_scalars_are_read_as_yaml_1_2_has_them(text: str, value: Any) -> None:
    found = parse_yaml(text, "x")[0]
    assert found == value
    assert type(found) is type(value)


def test_an_alias_gives_a_copy_that_an_override_changes_alone(tmp_path: Path) -> None:
    text = "model: builtin:tiny\npasses:\n- rounding: &o {bits: 3}\n- polishing: *o\n"
    recipe = Recipe.load(written(tmp_path, text), ["passes.polishing.bits=8"])
    assert [step.model_dump()["bits"] for step in recipe.passes] == [3, 8]


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(8)
)
CHAIN = "a0: &a0 x\n" + "".join(f"a{i}: &a{i} {'[' * 40}*a{i - 1}{']' * 40}\n" for i in range(1, 30))


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"[" * 100_000, [":1:", "nested more than 50 levels deep"]),
        (b"- " * 100_000, [":1:", "nested more than 50 levels deep"]),
        (b"{a: " * 100_000, [":1:", "nested more than 50 levels deep"]),
        (CHAIN.encode(), ["nested more than 50 levels deep"]),
        (BOMB.encode(), [":5:", "more than 20,000 values"]),
        (b"[" + b"[]," * 3_500_000 + b"]", ["larger than 1 MB"]),
        (b"model: &a [*a]", [":1:", "*a stands inside what it refers to"]),
        (b"model: *x", ["*x refers to no anchor"]),
        (bytes(range(256)), ["not UTF-8 text: byte 0x80 at offset 128"]),
        ("model: x".encode("utf-16"), ["not UTF-8 text"]),
        (b"model: a\n\x00", [":2:", "U+0000"]),
        (b"", ["the recipe is empty"]),
        (b"# nothing\n", ["the recipe is empty"]),
        (b"hello", ["the recipe is text", "mapping of keys"]),
        (b"- a\n- b\n", ["the recipe is a list"]),
        (b"model: a\nseed: 1\nmodel: b\n", [":3:", "model stands here a second time", "line 1"]),
        (b"model:\n\t- x\n", [":2:", "not valid YAML", "\\t"]),
        (b"model: a: b\n", [":1:", "not valid YAML"]),
        (b"model: a\n---\nmodel: b\n", [":2:", "second document"]),
        (b"model: !!python/object:os.system x\n", [":1:", "tag", "not allowed"]),
        (b"? [a]\n: b\n", [":1:", "a key must be plain text"]),
        (b'model: "\\ud800"\n', [":1:", "half a surrogate pair"]),
        (b'model: "\\UFFFFFFFF"\n', ["not valid YAML"]),
    ],
)
def test_a_file_that_is_no_recipe_gets_one_clear_message(tmp_path: Path, content: bytes, parts: list[str]) -> None:
    path = written(tmp_path, content)
    started = time.monotonic()
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    assert time.monotonic() - started < 10
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 300 + len(str(path))
    for part in parts:
        assert part in str(caught.value)


def test_a_missing_recipe_is_refused_with_the_nearest_file(tmp_path: Path) -> None:
    written(tmp_path, "model: x", "quickstart.yaml")
    with pytest.raises(StartError, match=r'no such file\. Did you mean "quickstart.yaml"\?') as caught:
        Recipe.load(tmp_path / "quikstart.yaml")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("path", ["a\0b", "x" * 300])
def test_an_impossible_path_is_refused(path: str) -> None:
    with pytest.raises(StartError, match="cannot be read"):
        Recipe.load(path)


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a folder"):
        Recipe.load(tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet="abc-:?[]{},&*!|>'\"%@`#\n \t~0129.eE+\\ud8\x00\x85\u2028", max_size=60))
def test_any_text_is_read_or_refused_with_a_recipe_error(text: str) -> None:
    try:
        parse_yaml(text, "x")
    except RecipeError:
        return


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from([*Recipe.model_fields, "x"]), VALUES, max_size=4), VALUES)
def test_any_values_make_a_recipe_or_are_refused_with_a_recipe_error(values: dict[str, Any], options: Any) -> None:
    for given_values in (values, tiny({"rounding": options}), tiny(**values)):
        try:
            recipe = Recipe.from_dict(given_values)
        except RecipeError:
            continue
        assert Recipe.from_dict(recipe.canonical()).canonical() == recipe.canonical()


# Messages


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (tiny({"rounding": {"bits": 5}}), "passes.0.rounding.bits: 5 is not allowed; allowed: 2, 3, 4, 8."),
        (tiny({"rounding": {"bits": "4"}}), 'passes.0.rounding.bits: "4" is not allowed; allowed: 2, 3, 4, 8.'),
        (tiny({"rounding": {"bits": True}}), "passes.0.rounding.bits: true is not allowed; allowed: 2, 3, 4, 8."),
        (tiny({"rounding": {"symmetric": 1}}), "passes.0.rounding.symmetric: 1 is not allowed; allowed: true, false."),
        (tiny({"rounding": {"damping": 0}}), "passes.0.rounding.damping: 0 is not allowed; allowed: a number above 0, at most 1."),
        (tiny({"rounding": {"damping": float("nan")}}), "passes: nan is not a value that a recipe can hold."),
        (tiny({"rounding": {"damping": 0.5}}), "passes.0.rounding.damping: one half is unlucky."),
        (tiny({"rounding": {"skip": "mlp"}}), 'passes.0.rounding.skip: "mlp" is not allowed; allowed: a list of text.'),
        (tiny({"rounding": {"skip": ["a", 3]}}), "passes.0.rounding.skip.1: 3 is not allowed; allowed: text."),
        (tiny({"rounding": {"targets": 3}}), "passes.0.rounding.targets: 3 is not allowed; allowed: a list of text or null."),
        (tiny({"rounding": {"targets": [3]}}), "passes.0.rounding.targets.0: 3 is not allowed; allowed: text."),
        (tiny({"rounding": {"bit": 4}}), 'passes.0.rounding.bit: unknown key; allowed: bits, damping, symmetric, skip, targets. Did you mean "bits"?'),
        (tiny({"zeroing": {"pattern": "2:4", "sparsity": 0.5}}), "passes.0.zeroing: give sparsity or pattern, not both."),
        (tiny("roundin"), 'passes.0: unknown pass "roundin"; allowed: exacting, merging, polishing, rounding, zeroing. Did you mean "rounding"?'),
        (tiny({"rounding": 4}), "passes.0.rounding: 4 is not allowed; allowed: a mapping of options."),
        (tiny({"rounding": None, "bits": 4}), "passes.0: {rounding: null, bits: 4} is not allowed; one pass an entry, its options indented below its name."),
        (tiny(3), "passes.0: 3 is not allowed; allowed: `name: {options}`."),
        (tiny() | {"passes": {"rounding": {}}}, "passes: {rounding: {}} is not allowed; allowed: a list of `- name: {options}`."),
        (tiny(sed=1), 'sed: unknown key; allowed: model, dtype, data, passes, benchmark, export, runtime, memory, output, seed, device, residency, min_coverage. Did you mean "seed"?'),
        (tiny(seed=-1), "seed: -1 is not allowed; allowed: a whole number from 0 to 4294967295."),
        (tiny(seed=1.5), "seed: 1.5 is not allowed; allowed: a whole number from 0 to 4294967295."),
        (tiny(dtype="bfloat"), 'dtype: "bfloat" is not allowed; allowed: auto, float32, bfloat16, float16. Did you mean "bfloat16"?'),
        (tiny(device="tpu9"), 'device: "tpu9" is not allowed; allowed: auto, cpu, cuda.'),
        (tiny(residency="disc"), 'residency: "disc" is not allowed; allowed: memory, disk. Did you mean "disk"?'),
        (tiny(min_coverage=2), "min_coverage: 2 is not allowed; allowed: a number from 0 to 1."),
        (tiny(memory="8 gigs"), 'memory: "8 gigs" is not a size; allowed: a number and a unit, as in 2GB or 1500 MiB.'),
        (tiny(memory=0), "memory: 0 is no room at all."),
        (tiny(export="dense"), 'export: "dense" is not allowed; allowed: a list of text.'),
        (tiny(export=["dens"]), f'export.0: unknown format "dens"; allowed: {", ".join(FORMATS.names())}. Did you mean "dense"?'),
        (tiny(export=["dense", "dense"]), 'export.1: "dense" stands there twice.'),
        (tiny(benchmark=True), "benchmark: true is not allowed; allowed: a mapping."),
        (tiny(benchmark={"runtimes": ["vllm"]}), f'benchmark.runtimes.0: unknown runtime "vllm"; allowed: {", ".join(RUNTIMES.names())}.'),
        (tiny(benchmark={"tasks": ["builtin:tinny"]}), 'benchmark.tasks.0: "builtin:tinny" does not exist; allowed: builtin:tiny. Did you mean "builtin:tiny"?'),
        (tiny(data=["x.txt"]), 'data: ["x.txt"] is not allowed; allowed: a mapping of calibration, evaluation, training.'),
        (tiny(data={"calibratoin": "x"}), 'data.calibratoin: unknown key; allowed: calibration, evaluation, training. Did you mean "calibration"?'),
        (tiny(data={"calibration": 3}), "data.calibration: 3 is not allowed; allowed: a source, or a mapping with one."),
        (tiny(data={"calibration": {"sample": 3}}), 'data.calibration.sample: unknown key; allowed: source, samples, length, separator, sampling, pack, seed, skip_bad. Did you mean "samples"?'),
        (tiny(data={"calibration": {"samples": 0}}), "data.calibration.samples: 0 is not allowed; allowed: a whole number of 1 or more or null."),
        (tiny(data={"calibration": {"separator": "sep"}}), 'data.calibration.separator: "sep" is not allowed; allowed: bos, none.'),
        ({"model": "a/b", "data": {"calibration": {"samples": 3}}}, "data.calibration.source: is missing. `builtin:<name>`, a local .txt or .jsonl file, a Hugging Face dataset id; for calibration, a folder of images."),
        ({"passes": []}, "model: is missing. Hub id, local folder or `builtin:tiny`."),
        (tiny(model="builtin:tinny"), 'model: "builtin:tinny" does not exist; allowed: builtin:tiny. Did you mean "builtin:tiny"?'),
        (tiny(model=""), 'model: "" is not allowed; allowed: text.'),
        (tiny(runtime={"x": object()}), "runtime: object is not a value that a recipe can hold."),
    ],
)  # fmt: skip
def test_each_mistake_gets_its_sentence(values: dict[str, Any], message: str) -> None:
    assert refusal(values) == message


def test_a_message_names_file_and_line(tmp_path: Path) -> None:
    text = "model: builtin:tiny\npasses:\n  - rounding:\n      symmetric: true\n      bits: 5\n      group_sice: 3\n"
    path = written(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    first, second = str(caught.value).splitlines()
    assert first == f"{path}:5: passes.0.rounding.bits: 5 is not allowed; allowed: 2, 3, 4, 8."
    assert second.startswith(f"{path}:6: passes.0.rounding.group_sice: unknown key")


def test_all_mistakes_are_listed_up_to_ten() -> None:
    lines = refusal(tiny(**{f"key{number}": 1 for number in range(14)})).splitlines()
    assert len(lines) == 11
    assert lines[-1] == "and 4 more."


def test_long_values_are_cut_in_messages() -> None:
    message = refusal(tiny(dtype="x" * 10_000))
    assert "xxx..." in message
    assert len(message) < 200


# Overrides


@pytest.mark.parametrize(
    "override",
    ["passes.rounding.bits=3", "passes.0.rounding.bits=3", "passes.0.bits=3", "passes.rounding={bits: 3}",
     "passes.0.rounding={bits: 3}", "passes.0={rounding: {bits: 3}}", "passes=[rounding: {bits: 3}]"],
)  # fmt: skip
@pytest.mark.parametrize("entry", ["rounding", {"rounding": None}, {"rounding": {"bits": 8}}])
def test_every_way_of_naming_a_pass_sets_its_option(override: str, entry: Any) -> None:
    assert Recipe.from_dict(tiny(entry), overrides=[override]).passes == (Rounding(bits=3),)


def test_an_override_leaves_the_other_options_alone() -> None:
    recipe = Recipe.from_dict(tiny({"rounding": {"bits": 3, "symmetric": False}}), overrides=["passes.rounding.bits=8"])
    assert recipe.passes == (Rounding(bits=8, symmetric=False),)


def test_the_last_override_wins() -> None:
    assert Recipe.from_dict(tiny(), overrides=["seed=1", "seed=2"]).seed == 2


def test_a_setting_below_a_bare_source_keeps_the_source(tmp_path: Path) -> None:
    written(tmp_path, "{}", "text.jsonl")
    values = {"model": "a/b", "data": {"calibration": "text.jsonl"}}
    entry = Recipe.from_dict(values, overrides=["data.calibration.samples=7"]).data.calibration
    assert entry
    assert (entry.source, entry.samples) == (str(tmp_path / "text.jsonl"), 7)


def test_overrides_open_sections_that_are_not_there() -> None:
    recipe = Recipe.from_dict(tiny(benchmark=False), overrides=["benchmark.goals.accuracy/facts=-1pt"])
    assert recipe.benchmark
    assert recipe.benchmark.goals == {"accuracy/facts": "-1pt"}
    assert Recipe.from_dict(tiny(), overrides=["benchmark=false"]).benchmark is False
    assert Recipe.from_dict(tiny(), overrides=["memory="]).memory is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("passes.rounding.bits=5", "--set passes.rounding.bits=5: 5 is not allowed; allowed: 2, 3, 4, 8."),
        ("passes.rounding.bit=3", '--set passes.rounding.bit=3: unknown key; allowed: bits, damping, symmetric, skip, targets. Did you mean "bits"?'),
        ("passes.roundin.bits=3", '--set passes.roundin.bits=3: no pass roundin in this recipe; it has: 0 (rounding). Did you mean "rounding"?'),
        ("passes.4.bits=3", "--set passes.4.bits=3: passes is a list without an entry 4; it has: 0 to 0."),
        ("passes={rounding: 3}", "--set passes={rounding: 3}: {rounding: 3} is not allowed; allowed: a list of `- name: {options}`."),
        ("passes=[rounding: {bits: 5}]", "--set passes=[rounding: {bits: 5}]: passes.0.rounding.bits: 5 is not allowed; allowed: 2, 3, 4, 8."),
        ("passes.rounding.skip.0=mlp", '--set passes.rounding.skip.0=mlp: passes.0.rounding.skip: {0: "mlp"} is not allowed; allowed: a list of text.'),
        ("sed=3", "--set sed=3: unknown key; allowed: "),
        ("sed.x=3", "--set sed.x=3: sed: unknown key; allowed: "),
        ("model.x=3", '--set model.x=3: model is "builtin:tiny", which has no keys inside.'),
        ("benchmark.tasks.0=x", "--set benchmark.tasks.0=x: benchmark.tasks is a list without an entry 0; it has: none, it is empty."),
        ("seed", "--set seed: expected KEY=VALUE"),
        ("=3", "--set =3: expected KEY=VALUE"),
        ("a..b=3", "--set a..b=3: expected KEY=VALUE"),
        ("seed=[", "--set seed=[: not valid YAML"),
        ("seed=" + "[" * 100_000, "nested more than 50 levels deep"),
        ("model=", "--set model=: null is not allowed; allowed: text."),
    ],
)  # fmt: skip
def test_a_wrong_override_is_named_in_its_message(override: str, message: str) -> None:
    values = tiny({"rounding": {}}, benchmark={"tasks": []})
    assert message in refusal(values, override)


def test_a_pass_that_stands_twice_must_be_named_by_index() -> None:
    message = refusal(tiny("polishing", "polishing"), "passes.polishing.bits=3")
    assert "stands there 2 times; say which: passes.0.polishing, passes.1.polishing." in message
    recipe = Recipe.from_dict(tiny("polishing", "polishing"), overrides=["passes.1.polishing.bits=3"])
    assert recipe.passes == (Polishing(), Polishing(bits=3))


def test_options_of_the_command_line_replace_keys(tmp_path: Path) -> None:
    path = written(tmp_path, "model: ./gone\n")
    recipe = Recipe.load(path, model="builtin:tiny", output="here", device=None)
    assert (recipe.model, recipe.output, recipe.device) == ("builtin:tiny", str(tmp_path / "here"), "auto")
    with pytest.raises(RecipeError, match=r'^--device tpu: "tpu" is not allowed; allowed: auto, cpu, cuda'):
        Recipe.load(path, model="builtin:tiny", device="tpu")


# Paths


def test_relative_paths_start_from_the_recipe_and_in_overrides_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("recipes/text.jsonl", "work/text.jsonl"):
        written(tmp_path, "{}", name)
    path = written(
        tmp_path,
        "model: builtin:tiny\noutput: out\ndata: {calibration: text.jsonl, evaluation: text.jsonl}\n",
        "recipes/r.yaml",
    )
    monkeypatch.chdir(tmp_path / "work")
    recipe = Recipe.load(path, ["data.evaluation=text.jsonl", "data.calibration.samples=3"])
    assert recipe.output == str(tmp_path / "recipes" / "out")
    assert recipe.data.calibration
    assert recipe.data.calibration.source == str(tmp_path / "recipes" / "text.jsonl")
    assert recipe.data.evaluation
    assert recipe.data.evaluation.source == str(tmp_path / "work" / "text.jsonl")


def test_a_local_folder_is_the_model_and_hub_ids_stay(tmp_path: Path) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert Recipe.from_dict({"model": "org/model"}).model == str(tmp_path / "org" / "model")
    assert Recipe.from_dict({"model": "org/other"}).model == "org/other"
    entry = Recipe.from_dict({"model": "gpt2", "data": {"calibration": "org/texts"}}).data.calibration
    assert entry
    assert entry.source == "org/texts"


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"model": "./modl"}, ["model: no such folder", 'Did you mean "model"?']),
        ({"model": "a/b/c"}, ["model: no such folder"]),
        ({"model": "calibration.jsonl"}, ["is a file; a model is a folder"]),
        ({"model": "gpt2", "data": {"calibration": "calibraton.jsonl"}}, ["data.calibration.source: no such file", 'Did you mean "calibration.jsonl"?']),
        ({"model": "gpt2", "data": {"calibration": "./texts"}}, ["no such file", "allowed: a .txt or .jsonl file"]),
        ({"model": "gpt2", "data": {"calibration": "model"}}, ["is a folder; allowed: a .txt or .jsonl file"]),
        ({"model": "gpt2", "data": {"calibration": "table.csv"}}, ["table.csv is neither a .txt nor a .jsonl file"]),
        ({"model": "gpt2", "benchmark": {"tasks": ["./arc_easy"]}}, ["benchmark.tasks.0: no such file"]),
        ({"model": "gpt2", "data": {"calibration": "x" * 5000 + ".txt"}}, ["no such file"]),
    ],
)  # fmt: skip
def test_a_path_that_is_not_there_is_refused_when_the_recipe_is_read(
    tmp_path: Path, values: dict[str, Any], parts: list[str]
) -> None:
    (tmp_path / "model").mkdir()
    written(tmp_path, "{}", "calibration.jsonl")
    written(tmp_path, "a,b", "table.csv")
    message = refusal(values)
    for part in parts:
        assert part in message


# What must be there


def test_the_builtin_model_brings_its_own_texts_and_items() -> None:
    recipe = Recipe.from_dict(tiny("zeroing"))
    for role, samples, sampling in (("calibration", 128, "random"), ("evaluation", 64, "sequential")):
        entry = getattr(recipe.data, role)
        assert (entry.source, entry.samples, entry.sampling, entry.seed) == ("builtin:tiny", samples, sampling, 0)
    assert recipe.data.training
    assert recipe.benchmark
    assert recipe.benchmark.tasks == ("builtin:tiny",)


def test_defaults_of_a_text_depend_on_its_role(tmp_path: Path) -> None:
    written(tmp_path, "{}", "t.jsonl")
    data = {"calibration": "t.jsonl", "evaluation": {"source": "t.jsonl", "seed": 9}}
    recipe = Recipe.from_dict({"model": "a/b", "seed": 5, "data": data})
    calibration, evaluation = recipe.data.calibration, recipe.data.evaluation
    assert calibration
    assert evaluation
    assert (calibration.samples, calibration.sampling, calibration.seed, calibration.pack) == (128, "random", 5, True)
    assert (evaluation.samples, evaluation.sampling, evaluation.seed) == (None, "sequential", 9)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"passes": ["zeroing"]}, "passes.0.zeroing: zeroing needs text: give data.calibration"),
        ({"benchmark": {"metrics": ["weights_bytes", "perplexity"]}}, "benchmark.metrics.1: perplexity needs text: give data.evaluation"),
        ({"benchmark": {"goals": {"kl_divergence": 0.1}}}, "benchmark.goals.kl_divergence: kl_divergence needs text: give data.evaluation"),
        ({"benchmark": {"metrics": ["accuracy"]}}, "benchmark.metrics.0: accuracy needs test items: give benchmark.tasks"),
        ({"benchmark": {"goals": {"accuracy/facts": "-1pt"}}}, "accuracy/facts needs test items"),
    ],
)  # fmt: skip
def test_text_that_is_asked_for_and_not_given_is_refused(values: dict[str, Any], message: str) -> None:
    assert message in refusal({"model": "a/b", **values})


def test_recipes_that_need_no_text_are_read_without_any() -> None:
    recipe = Recipe.from_dict({"model": "a/b", "passes": ["rounding"], "benchmark": {"metrics": ["weights_bytes"]}})
    assert recipe.data.evaluation is None


# Order


@pytest.mark.parametrize(
    "names",
    [["zeroing", "rounding"], ["zeroing", "zeroing", "rounding"], ["rounding", "polishing"], ["polishing", "zeroing"]],
)
def test_an_order_that_the_passes_accept_is_read(names: list[str]) -> None:
    assert [step.name for step in Recipe.from_dict(tiny(*names)).passes] == names


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["rounding", "zeroing"], "passes.1.zeroing cannot follow passes.0.rounding: it takes dense or sparse weights, and rounding leaves quantized ones. Put zeroing first."),
        (["rounding", "rounding"], "passes.1.rounding cannot follow passes.0.rounding: it takes dense or sparse weights, and rounding leaves quantized ones. Leave one of the two out."),
        (["zeroing", "polishing"], "passes.1.polishing cannot follow passes.0.zeroing: it takes dense or quantized weights, and zeroing leaves sparse ones. Put polishing first."),
        (["exacting", "zeroing"], "passes.1.zeroing cannot follow passes.0.exacting: it takes dense or sparse weights, and exacting leaves quantized ones. Leave one of the two out."),
        (["zeroing", "rounding", "polishing"], "passes.2.polishing cannot follow passes.0.zeroing"),
        (["merging"], "passes.0.merging cannot come here: it takes adapter weights, and the model's are dense."),
    ],
)  # fmt: skip
def test_an_order_that_cannot_be_is_refused_in_one_sentence(names: list[str], message: str) -> None:
    found = refusal(tiny(*names))
    assert found.startswith(message)
    assert "\n" not in found


def test_a_refused_order_names_the_line_of_the_pass(tmp_path: Path) -> None:
    path = written(tmp_path, "model: builtin:tiny\npasses:\n- rounding\n- zeroing:\n    bits: 3\n")
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    assert str(caught.value).startswith(f"{path}:4: passes.1.zeroing cannot follow passes.0.rounding: ")


# Goals and sizes


@pytest.mark.parametrize(
    ("size", "count"),
    [("2GB", 2_000_000_000), ("1.5 KiB", 1536), ("500 MB", 500_000_000), ("3 gib", 3 * 2**30), ("12B", 12), (4096, 4096), ("1kB", 1000)],
)  # fmt: skip
def test_sizes_are_read(size: str | int, count: int) -> None:
    assert parse_size(size) == count


@pytest.mark.parametrize("size", ["2", "2G", "GB", "-2GB", "2 GB extra", -1, True, float("nan"), "1e3MB", ""])
def test_what_is_no_size_is_refused(size: Any) -> None:
    with pytest.raises(RecipeError, match="is not a size; allowed"):
        parse_size(size)


@pytest.mark.parametrize(
    ("metric", "written_goal", "original", "threshold"),
    [
        ("perplexity", "+2%", 10.0, 10.2), ("perplexity", "+0.5", 10.0, 10.5), ("perplexity", 12.5, 10.0, 12.5),
        ("accuracy", "-1pt", 0.9, 0.89), ("accuracy", "90%", 0.5, 0.9), ("accuracy/facts", "-2%", 0.5, 0.49),
        ("weights_bytes", "2GB", 9e9, 2e9), ("weights_bytes", "-60%", 1000.0, 400.0), ("top1_agreement", 0.95, 1.0, 0.95),
        ("accuracy", -0.05, 0.9, 0.85), ("decode_tokens_per_second", "+20 %", 50.0, 60.0), ("weights_bytes", 1000, 1.0, 1000.0),
    ],
)  # fmt: skip
def test_goals_become_thresholds(metric: str, written_goal: Any, original: float, threshold: float) -> None:
    assert parse_goal(metric, written_goal).threshold(original) == pytest.approx(threshold)


def test_a_goal_is_met_on_the_good_side_of_its_threshold() -> None:
    goal = parse_goal("perplexity", "+2%")
    assert (goal.kind, goal.bound, goal.text) == ("relative", 0.02, "+2%")
    assert goal.met(10.2, 10.0, higher_is_better=False)
    assert not goal.met(10.21, 10.0, higher_is_better=False)
    points = parse_goal("accuracy", "-1pt")
    assert (points.kind, points.bound) == ("points", -0.01)
    assert points.met(0.89, 0.9, higher_is_better=True)
    assert not points.met(0.885, 0.9, higher_is_better=True)


@pytest.mark.parametrize(
    ("metric", "written_goal", "message"),
    [
        ("perplexity", "two", '"two" is not a goal; allowed: a change as in +2%, -1pt'),
        ("perplexity", True, "true is not allowed; allowed: text or a number."),
        ("perplexity", "2GB", "is a size, and perplexity is not counted in bytes"),
        ("perplexity", "-1pt", "is a share, and perplexity is not one"),
        ("weights_bytes", "90%", "is a share, and weights_bytes is not one"),
        ("accuracy", "1pt", "needs a sign"),
        ("kl_divergence", "+2%", "the original's kl_divergence is 0"),
        ("perplexityy", "+2%", 'unknown metric "perplexityy"'),
        ("accuracy/", "+2%", 'unknown metric "accuracy/"'),
        ("perplexity", "1e999", "too large"),
    ],
)  # fmt: skip
def test_a_goal_that_means_nothing_is_refused(metric: str, written_goal: Any, message: str) -> None:
    found = refusal(tiny(benchmark={"goals": {metric: written_goal}}))
    assert found.startswith(f"benchmark.goals.{metric}: ")
    assert message in found


def test_a_goal_must_be_among_the_metrics_that_are_measured() -> None:
    message = refusal(tiny(benchmark={"metrics": ["perplexity"], "goals": {"accuracy": "-1pt"}}))
    assert message == "benchmark.goals.accuracy: accuracy is not measured; add it to benchmark.metrics."


# Canonical form, digest, differences


def test_the_canonical_form_is_json_and_reads_back_the_same(tmp_path: Path) -> None:
    written(tmp_path, "{}", "t.jsonl")
    recipe = Recipe.from_dict(tiny({"zeroing": {"pattern": "2:4"}}, data={"calibration": "t.jsonl"}, memory="2GB"))
    canonical = recipe.canonical()
    again = Recipe.from_dict(json.loads(json.dumps(canonical, allow_nan=False)))
    assert again.canonical() == canonical
    assert again.digest() == recipe.digest()
    assert canonical["passes"] == [{"zeroing": recipe.passes[0].options()}]
    assert recipe.memory_bytes == 2_000_000_000


def test_the_digest_ignores_key_order_and_what_does_not_decide_the_model(tmp_path: Path) -> None:
    values = tiny({"rounding": {"bits": 3, "symmetric": False}})
    digest = Recipe.from_dict(values).digest()
    turned = {"passes": [{"rounding": {"symmetric": False, "bits": 3}}], "model": "builtin:tiny", "seed": 0}
    assert Recipe.from_dict(turned).digest() == digest
    for same in ({"output": "x"}, {"benchmark": False}, {"device": "cpu"}, {"residency": "disk"}, {"memory": "1GB"},
                 {"data": {"evaluation": {"samples": 3}}}, {"min_coverage": 0.1}):  # fmt: skip
        assert Recipe.from_dict(values | same).digest() == digest


@pytest.mark.parametrize(
    "changed",
    [{"seed": 1}, {"dtype": "float32"}, {"export": ["packed"]}, {"data": {"calibration": {"samples": 7}}},
     {"passes": [{"rounding": {"bits": 3}}]}, {"model": "org/other"}],
)  # fmt: skip
def test_the_digest_changes_with_what_decides_the_model(changed: dict[str, Any]) -> None:
    values = tiny("rounding")
    assert Recipe.from_dict(values | changed).digest() != Recipe.from_dict(values).digest()


def test_the_seed_decides_even_without_texts() -> None:
    first, second = (Recipe.from_dict({"model": "a/b", "seed": seed}) for seed in (0, 1))
    assert first.digest() != second.digest()
    assert differences(first.canonical(), second.canonical()) == ["seed: 0 -> 1"]


def test_differences_are_said_by_place() -> None:
    old = Recipe.from_dict(tiny("zeroing", "rounding")).canonical()
    new = Recipe.from_dict(
        tiny({"zeroing": {"sparsity": 0.5}}, "polishing", dtype="float32", benchmark=False, export=["packed"])
        | {"passes": [{"zeroing": {"sparsity": 0.5}}, {"rounding": {"bits": 3}}]}
    ).canonical()
    assert differences(old, new) == [
        'dtype: "auto" -> "float32"',
        "passes.0.zeroing.sparsity: null -> 0.5",
        "passes.1.rounding.bits: 4 -> 3",
        'export.0: (absent) -> "packed"',
    ]
    assert differences(old, old) == []


def test_another_pass_at_a_place_is_one_difference() -> None:
    old, new = (Recipe.from_dict(tiny(name)).canonical() for name in ("rounding", "polishing"))
    assert differences(old, new) == ["passes.0: rounding -> polishing"]


def _without(canonical: dict[str, Any], *places: str) -> dict[str, Any]:
    """The canonical recipe as a version before these keys stored it."""
    stored = json.loads(json.dumps(canonical))
    for place in places:
        inner: Any = stored
        *above, last = [int(key) if key.isdigit() else key for key in place.split("/")]
        for key in above:
            inner = inner[key]
        del inner[last]
    return stored


#: Keys that a version before them did not store: of the recipe, a part of it, a text, a pass, a group of options.
LATER = ("runtime", "dtype", "data/calibration/skip_bad", "data/calibration/pack", "data/calibration/seed",
         "passes/0/zeroing/damping", "passes/0/zeroing/pattern", "passes/1/measured/scale", "passes/1/measured/ruler/marks")  # fmt: skip


class Ruler(BaseModel):
    """A group of options inside a pass."""

    length: int
    marks: int = 10


class Measured(Rounding):
    name: ClassVar[str] = "measured"

    ruler: Ruler | None = None
    scale: Ruler | None = None


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A recipe with changes to the options of its passes and its text, and to its own keys."""
    monkeypatch.setitem(PASSES.table, "measured", f"{__name__}:Measured")
    written(tmp_path, "{}", "t.jsonl")

    def build(zeroing: Any = None, measured: Any = None, text: Any = None, **keys: Any) -> Recipe:
        passes = {"zeroing": zeroing or {}}, {"measured": {"ruler": {"length": 3}, **(measured or {})}}
        data = {"calibration": {"source": str(tmp_path / "t.jsonl"), **(text or {})}}
        return Recipe.from_dict(tiny(*passes, data=data, **keys))

    return build


@pytest.mark.parametrize("place", LATER)
def test_a_key_that_came_later_is_no_change_where_it_has_its_default(measured: Any, place: str) -> None:
    recipe = measured()
    stored = _without(recipe.canonical(), place)
    assert differences(stored, recipe.canonical()), "it decides the model"
    assert changes_since(stored, recipe) == []
    assert changes_since(_without(recipe.canonical(), *LATER), recipe) == []


def test_a_key_that_came_later_is_a_change_where_it_has_another_value(measured: Any) -> None:
    stored = _without(measured().canonical(), *LATER)
    assert changes_since(stored, measured(dtype="float32")) == ['dtype: "auto" -> "float32"']
    assert changes_since(stored, measured(runtime={"prepack": True})) == ["runtime.prepack: false -> true"]
    assert changes_since(stored, measured(text={"pack": False})) == ["data.calibration.pack: true -> false"]
    assert changes_since(stored, measured(zeroing={"pattern": "2:4"})) == ['passes.0.zeroing.pattern: null -> "2:4"']
    assert changes_since(stored, measured(measured={"ruler": {"length": 3, "marks": 5}})) == [
        "passes.1.measured.ruler.marks: 10 -> 5"
    ]
    defaults_of_a_group = measured(measured={"scale": {"length": 3}})
    assert changes_since(stored, defaults_of_a_group)[0].startswith("passes.1.measured.scale: null -> ")


def test_what_was_stored_is_compared_as_it_stands(measured: Any) -> None:
    stored = measured(zeroing={"damping": 0.1}).canonical()
    assert changes_since(stored, measured()) == ["passes.0.zeroing.damping: 0.1 -> 0.01"]
    stored["passes"][0]["zeroing"]["gone"] = 3
    assert changes_since(stored, measured(zeroing={"damping": 0.1})) == ["passes.0.zeroing.gone: 3 -> (absent)"]
    assert "passes.0: zeroing -> rounding" in changes_since(stored, Recipe.from_dict(tiny("rounding")))


# Schema and starter


def test_the_schema_holds_every_pass_with_its_options() -> None:
    schema = Recipe.json_schema()
    json.dumps(schema)
    assert set(schema["properties"]) == set(Recipe.model_fields)
    entries = schema["properties"]["passes"]["items"]["anyOf"]
    assert entries[0] == {"enum": ["exacting", "merging", "polishing", "rounding", "zeroing"]}
    assert [next(iter(entry["properties"])) for entry in entries[1:]] == entries[0]["enum"]
    bits = schema["$defs"]["Rounding"]["properties"]["bits"]
    assert bits["enum"] == [2, 3, 4, 8]
    assert bits["description"] == "Bits of each weight."
    assert all(schema["properties"][name].get("description") for name in Recipe.model_fields)


def test_the_schema_agrees_with_a_validator() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = Recipe.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    good = [
        tiny("rounding", {"zeroing": None}, data={"calibration": "builtin:tiny"}, benchmark=False),
        Recipe.from_dict(tiny({"rounding": {"bits": 3}})).canonical(),
    ]
    bad = [tiny({"rounding": {"bits": 5}}), tiny("nope"), tiny(sed=3), {"passes": []}, tiny({"rounding": {"bit": 3}})]
    check = jsonschema.Draft202012Validator(schema)
    assert [check.is_valid(values) for values in good + bad] == [True] * len(good) + [False] * len(bad)


@pytest.mark.parametrize("model", ["builtin:tiny", "org/model", "weird: 'na\"me"])
def test_the_starter_recipe_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    from compress.registry import Registry

    shipped = Registry(
        "pass", {"rtn": "compress.passes.rtn:RTN", "gptq": "compress.passes.gptq:GPTQ"}, "compress.passes"
    )
    monkeypatch.setattr(PASSES, "table", shipped.table)
    recipe = Recipe.load(written(tmp_path, starter_recipe(model)))
    assert recipe.model == model
    assert len(recipe.passes) == 1


def test_a_recipe_and_its_parts_are_frozen() -> None:
    recipe = Recipe.from_dict(tiny("rounding"))
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        DataEntry(source="x").samples = 3  # type: ignore[misc]


def test_a_pass_that_cannot_be_imported_is_no_unknown_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PASSES.table, "gone", "compress.passes.gone:Gone")
    monkeypatch.delitem(sys.modules, "compress.passes.gone", raising=False)
    with pytest.raises(ModuleNotFoundError):
        Recipe.from_dict(tiny("gone"))


def test_every_refusal_is_an_error_the_command_line_knows() -> None:
    assert issubclass(RecipeError, StartError)
    assert issubclass(StartError, CompressError)
