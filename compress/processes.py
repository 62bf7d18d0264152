"""Several processes on one recipe: `accelerate launch -m compress run recipe.yaml`, or torchrun.

The first process does the run and writes its folder. The others take part in training alone, each with its share of a
step's windows; the model as it was when training began they read from the first one's stages.
"""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path


def process_count() -> int:
    """How many processes train together; 1 where none were launched."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def meet(device: str) -> str:
    """Waits until all processes are here; returns a word that is this start's own, the same for all.
    StartError for a launch in a way that is none of those here."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    from compress.sharding import check_launch

    check_launch()
    PartialState(cpu=device == "cpu")
    word = [uuid.uuid4().hex]
    broadcast_object_list(word)
    return word[0]


def wait_for(*paths: Path) -> Path:
    """Waits until one of the files is there, for as long as it takes, and returns it."""
    while True:
        found = next((path for path in paths if path.exists()), None)
        if found is not None:
            return found
        time.sleep(0.1)
