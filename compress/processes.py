"""Several processes on one recipe: `accelerate launch -m compress run recipe.yaml`.

The first process does the run and writes its folder. The others take part in training alone, each with its share of a
step's windows; what came before they read from the first one's stages.
"""

from __future__ import annotations

import os


def process_count() -> int:
    """How many processes train together; 1 where none were launched."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", "0"))
