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
    """A loaded artifact, ready to run on this process's threads. Holds one key and value cache for `batch` rows.

    Only the four methods below are needed. What else an engine can tell is used where it does, and its figures are null
    or left out where it does not.
    """

    #: What the report names as the runtime of a figure; the Runtime's own name where empty.
    runtime: str = ""
    #: A sentence for the report, or None.
    note: str | None = None
    #: Most rows that `prefill` takes; 1 where the engine has no batches.
    largest_batch: int = 1
    #: Most tokens of a row, prompt and new ones together; None where there is no limit.
    context: int | None = None
    #: Whether it writes text; where not, `prefill` is all that is timed.
    generates: bool = True
    #: Bytes of the weights that one step at batch 1 reads; None: as many as the artifact's files hold.
    read_bytes: int | None = None

    @abstractmethod
    def logits(self, ids: Sequence[int]) -> np.ndarray | None:
        """float32 `[len(ids), vocabulary]`: after each token, what comes next. None where the engine does not tell.
        The cache is empty before and afterwards."""

    def tokens(self, text: str, special: bool = False) -> list[int] | None:
        """The text's token ids, with those that stand at its ends if `special`; None without a tokenizer."""
        return None

    @abstractmethod
    def prefill(self, ids: Sequence[Sequence[int]]) -> None:
        """Empties the cache and reads the prompts, one a row and all of one length, up to the last one's logits. All of
        it is done when this returns, on whatever device."""

    @abstractmethod
    def step(self) -> list[int]:
        """The likeliest next token of each row, which is appended to it. Only after `prefill`. The first one follows
        from what `prefill` computed; each later one reads the token before it."""

    def close(self) -> None:  # noqa: B027  (most engines have nothing to give back)
        """Gives back what the engine holds."""

    def tokens_read(self, length: int) -> int:
        """How many tokens one row of a prompt of `length` makes the model read (another number for images)."""
        return length

    def resident_bytes(self) -> int | None:
        """Bytes that the weights take in memory as they are loaded, what is shared once; None where the engine does not
        tell."""
        return None

    def cache_bytes(self) -> int | None:
        """Bytes that the key and value cache holds now; None where the engine does not tell."""
        return None

    def processes(self) -> tuple[int, ...]:
        """Ids of the processes, besides this one, that hold the model; their memory is counted too."""
        return ()
