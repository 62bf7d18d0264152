"""Recipes: read from YAML, validated as a whole, compared with one another. Importing this package imports no torch.

`recipe.py` is the recipe and how one is built; `sections.py` its parts, `goals.py` goals and sizes. `document.py` is
the YAML with the places of its keys, `check.py` says what is wrong at a place, `changes.py` what changed.
"""

from compress.recipe.changes import changes_since, differences
from compress.recipe.check import check_order
from compress.recipe.goals import Goal, parse_goal, parse_size
from compress.recipe.recipe import Recipe
from compress.recipe.sections import ROLES, Benchmark, Data, DataEntry, Role, Runtime

__all__ = [
    "ROLES", "Benchmark", "Data", "DataEntry", "Goal", "Recipe", "Role", "Runtime", "changes_since", "check_order",
    "differences", "parse_goal", "parse_size",
]  # fmt: skip
