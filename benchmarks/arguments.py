"""The arguments that the scripts share: a model, its texts, and where the result goes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def arguments(doc: str | None, *paths: str, **others: dict[str, Any]) -> argparse.Namespace:
    """What was given on the command line: MODEL, --calibration, --evaluation, --name, --length, --samples,
    --separator, --calibration-seed, and `others` (as of `add_argument`), which may be one of these. Those that are
    paths, `paths` too, become absolute ones; what is no file (builtin:tiny) stays."""
    parser = _parser(doc)
    parser.add_argument("model")
    shared: dict[str, dict[str, Any]] = {
        "calibration": {"required": True},
        "evaluation": {"required": True},
        "name": {"required": True},
        "length": {"type": int, "default": 256},
        "samples": {"type": int},
        "separator": {"default": "bos", "choices": ["bos", "none"]},
        "calibration_seed": {"type": int, "default": 1234},
    }
    options = _parsed(parser, {**shared, **others})
    for name in ("model", "calibration", "evaluation", *paths):
        value = getattr(options, name)
        if value and Path(value).exists():
            setattr(options, name, str(Path(value).resolve()))
    return options


def settings(doc: str | None, **options: Any) -> argparse.Namespace:
    """What was given on the command line of a script with `options` of its own and --name: of each its default, or the
    words of `add_argument`."""
    given = {
        name: how if isinstance(how, dict) else {"type": type(how), "default": how} for name, how in options.items()
    }
    return _parsed(_parser(doc), {**given, "name": {"required": True}})


def _parser(doc: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=(doc or "").partition("\n")[0])


def _parsed(parser: argparse.ArgumentParser, options: Mapping[str, dict[str, Any]]) -> argparse.Namespace:
    for name, how in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **how)
    return parser.parse_args()


def write_result(stem: str, result: Any, markdown: str | None = None) -> None:
    """Writes a result as `results/<stem>.json`, and as `.md` if there is one to read."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    if markdown is not None:
        (RESULTS / f"{stem}.md").write_text(markdown)


def kept_rows(stem: str) -> list[dict[str, Any]]:
    """The rows of a result that is there already."""
    place = RESULTS / f"{stem}.json"
    rows: list[dict[str, Any]] = json.loads(place.read_text())["rows"] if place.exists() else []
    return rows


def add_row(
    stem: str, rows: Sequence[dict[str, Any]], command: str, markdown: Callable[[Sequence[dict[str, Any]]], str]
) -> None:
    """Writes rows, the newest last, and prints that one."""
    write_result(stem, {"command": command, "rows": rows}, markdown(rows))
    print(markdown(rows[-1:]).splitlines()[-1], flush=True)
