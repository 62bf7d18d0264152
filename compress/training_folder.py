"""The folder of a training run, where its checkpoints are."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: What the Trainer writes last: a checkpoint that has it is whole.
_STATE = "trainer_state.json"


@contextmanager
def place_for(folder: Path | None) -> Iterator[Path]:
    """`folder`, or one that is gone afterwards."""
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; those that are not are removed."""
    whole = []
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            whole.append((json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))["global_step"], checkpoint))
        except (OSError, ValueError, KeyError):
            shutil.rmtree(checkpoint, ignore_errors=True)
    return max(whole)[1] if whole else None
