"""What a runtime makes of an exported artifact: an Engine, which takes token ids and gives logits and tokens.

The benchmark times engines of several runtimes in turn, so each does one small step when asked, and nothing ahead.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


class Engine(ABC):
    """A loaded artifact, ready to run on this process's threads. Holds one key and value cache for `batch` rows."""

    #: Most rows that `prefill` takes; 1 where the engine has no batches.
    largest_batch: int = 1

    @abstractmethod
    def logits(self, ids: Sequence[int]) -> np.ndarray | None:
        """float32 `[len(ids), vocabulary]`: after each token, what comes next. None where the engine does not tell.
        The cache is empty before and afterwards."""

    def tokens(self, text: str, special: bool = False) -> list[int] | None:
        """The text's token ids, with those that stand at its ends if `special`; None without a tokenizer."""
        return None

    @abstractmethod
    def prefill(self, ids: Sequence[Sequence[int]]) -> None:
        """Empties the cache and reads the prompts, one a row and all of one length, up to the last one's logits."""

    @abstractmethod
    def step(self) -> list[int]:
        """The likeliest next token of each row, which is appended to it. Only after `prefill`."""

    def close(self) -> None:  # noqa: B027  (most engines have nothing to give back)
        """Gives back what the engine holds."""
