from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import BaseModel, Field

from compress import registry
from compress.errors import CompressError, RecipeError
from compress.registry import (
    FORMATS,
    METRICS,
    PASSES,
    RUNTIMES,
    Option,
    Registry,
    allowed_words,
    pass_options,
    type_words,
)


class Toy(BaseModel):
    """Stands in for a pass: only its fields matter here."""

    name: ClassVar[str] = "toy"
    bits: Literal[2, 4] = Field(4, description="Bits of\n  each weight.")
    sparsity: float = Field(ge=0, lt=1, description="Share of zeros.")
    skip: tuple[str, ...] = ()
    pattern: str | None = None


class Other:
    name: ClassVar[str] = "other"


class Distribution:
    def __init__(self, name: str):
        self.name = name


def entry_point(name: str, value: str, owner: str) -> EntryPoint:
    return EntryPoint(name, value, "compress.toys")._for(Distribution(owner))  # type: ignore[arg-type]


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> tuple[Registry, list[EntryPoint]]:
    """A registry with one class of its own, and the list of what installed packages offer it."""
    points: list[EntryPoint] = []

    def offered(group: str) -> list[EntryPoint]:
        return [point for point in points if point.group == group]

    monkeypatch.setattr(registry, "entry_points", offered)
    return Registry("toy", {"toy": f"{__name__}:Toy"}, "compress.toys"), points


def test_the_tables_name_what_the_contract_names() -> None:
    assert {"rtn", "gptq", "magnitude", "wanda"} <= set(PASSES.names())
    assert {"dense", "compressed-tensors", "packed"} <= set(FORMATS.names())
    assert "transformers" in RUNTIMES
    assert {"perplexity", "accuracy", "kl_divergence", "top1_agreement", "weights_bytes", "bits_per_weight"} <= set(
        METRICS
    )


def test_names_are_sorted_and_hold_those_of_installed_packages(toys: tuple[Registry, list[EntryPoint]]) -> None:
    found, points = toys
    points.append(entry_point("other", f"{__name__}:Other", "else"))
    assert found.names() == ["other", "toy"]
    assert "other" in found
    assert "third" not in found


def test_get_imports_the_class_of_the_table_and_of_an_installed_package(
    toys: tuple[Registry, list[EntryPoint]],
) -> None:
    found, points = toys
    points.append(entry_point("other", f"{__name__}:Other", "else"))
    assert found.get("toy") is Toy
    assert found.get("other") is Other


def test_an_unknown_name_is_refused_with_all_names_and_the_nearest(toys: tuple[Registry, list[EntryPoint]]) -> None:
    with pytest.raises(RecipeError, match=r'unknown toy "toi"; allowed: toy\. Did you mean "toy"\?') as caught:
        toys[0].get("toi")
    assert caught.value.exit_code == 2


def test_an_installed_package_cannot_take_over_a_name_of_this_one(toys: tuple[Registry, list[EntryPoint]]) -> None:
    found, points = toys
    points.append(entry_point("toy", f"{__name__}:Other", "rogue"))
    assert found.get("toy") is Toy


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("no_such_module_at_all:Pass", ["cannot be imported", "no_such_module_at_all", "ModuleNotFoundError"]),
        (f"{__name__}:Missing", ["cannot be imported", "AttributeError"]),
        (f"{__name__}:entry_point", ["is not a class"]),
        (f"{__name__}:Other", ['calls itself "other"']),
    ],
)
def test_a_broken_entry_point_is_an_error_that_names_its_package(
    toys: tuple[Registry, list[EntryPoint]], value: str, parts: list[str]
) -> None:
    found, points = toys
    points.append(entry_point("broken", value, "their-package"))
    with pytest.raises(CompressError) as caught:
        found.get("broken")
    for part in ["their-package", '"broken"', *parts]:
        assert part in str(caught.value)


def test_two_packages_with_one_name_are_refused_and_both_named(toys: tuple[Registry, list[EntryPoint]]) -> None:
    found, points = toys
    points += [entry_point("x", f"{__name__}:Other", "first"), entry_point("x", f"{__name__}:Toy", "second")]
    with pytest.raises(CompressError, match="first and second"):
        found.get("x")


def test_the_options_of_a_pass_come_from_its_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PASSES.table, "toy", f"{__name__}:Toy")
    assert pass_options("toy") == [
        Option("bits", "whole number", "4", "2, 4", "Bits of each weight."),
        Option("sparsity", "number", "required", "a number of at least 0 and below 1", "Share of zeros."),
        Option("skip", "list of text", "[]", "a list of text", ""),
        Option("pattern", "text or null", "null", "text or null", ""),
    ]


@pytest.mark.parametrize(
    ("annotation", "default", "allowed"),
    [
        (int, Field(ge=1), "a whole number of 1 or more"),
        (int, Field(ge=1, le=8), "a whole number from 1 to 8"),
        (float, Field(gt=0), "a number above 0"),
        (float, Field(gt=0, le=1), "a number above 0, at most 1"),
        (float, Field(gt=0, lt=1), "a number above 0 and below 1"),
        (float, Field(le=1), "a number of 1 or less"),
        (int, Field(multiple_of=32), "a whole number, a multiple of 32"),
        (bool, Field(), "true, false"),
        (str, Field(pattern="^[0-9]+:[0-9]+$"), "text matching ^[0-9]+:[0-9]+$"),
        (Literal["row", "layer"], Field(), "row, layer"),
        (dict[str, int], Field(), "a mapping"),
        (Annotated[int, Field(ge=2)] | None, Field(), "a whole number of 2 or more or null"),
    ],
)
def test_what_a_field_allows_is_said_in_words(annotation: Any, default: Any, allowed: str) -> None:
    class Fields(BaseModel):
        option: annotation = default

    assert allowed_words(Fields.model_fields["option"]) == allowed


def test_types_are_said_in_words() -> None:
    assert type_words(list[int] | None) == "list of whole number or null"
    assert type_words(Literal["a", 3]) == "text or whole number"


def test_importing_the_registry_and_the_recipe_imports_no_torch() -> None:
    code = "import compress.registry, compress.recipe, sys; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
