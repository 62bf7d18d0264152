"""The embedded base model and its text, so that everything runs with no network.

Importing this module is light: it imports neither torch nor transformers.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compress.builtin import text as _text

# name: folder inside this package
MODELS = {"tiny": "tiny"}


def _check(name: str) -> None:
    if name not in MODELS:
        raise ValueError(f"unknown built-in model {name!r}: allowed are {', '.join(MODELS)}")


def model_path(name: str = "tiny") -> Path:
    """Return the folder of an embedded model (weights, config, tokenizer, model card)."""
    _check(name)
    return Path(__file__).resolve().parent / MODELS[name]


def documents(name: str, split: str, seed: int = 0) -> Iterator[str]:
    """Return the endless stream of documents of a model's own world.

    `split` is `training`, `calibration` or `evaluation`; no document is in two of them, whatever the seeds.
    """
    _check(name)
    return _text.documents(split, seed)


def items(split: str = "evaluation", per_area: int = 200, seed: int = 0) -> list[dict[str, Any]]:
    """Return `per_area` different test items of each area; `compress.builtin.text.items` says their forms."""
    return _text.items(split, per_area, seed)


def areas() -> list[str]:
    """Return the names of the areas that `items` covers."""
    return _text.areas()
