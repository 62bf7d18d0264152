"""`compress generate`: text from an exported folder, as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from transformers import TextStreamer

from compress.errors import StartError
from compress.loading import load
from compress.locating import locate
from compress.opening import read_tokenizer
from compress.preparation import check_device


class _Writer(TextStreamer):  # type: ignore[misc]
    """Gives finished pieces of text to a function, and counts tokens."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.tokens = write, 0

    def put(self, value: Any) -> None:
        if not self.next_tokens_are_prompt:
            self.tokens += 1
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)


def stream_text(
    folder: str | Path,
    prompt: str,
    tokens: int,
    *,
    write: Callable[[str], None],
    device: str = "auto",
    activations: Literal["float", "int8"] | None = None,
    prepack: bool | None = None,
) -> float:
    """Continues `prompt` greedily by at most `tokens` tokens, giving the text to `write` as it comes. `activations` and
    `prepack` are those of `compress.load`.

    Returns new tokens per second, the prompt's processing included.
    """
    place = locate(str(folder))
    model = load(place, device=check_device(device), activations=activations, prepack=prepack)
    if not model.can_generate():
        raise StartError(f"{folder} is a {type(model).__name__}, which does not write text.")
    tokenizer = read_tokenizer(place)
    if tokenizer is None:
        raise StartError(f"{folder} holds no tokenizer, so a prompt cannot be read.")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    if ids.shape[1] == 0:
        raise StartError("--prompt is empty: give at least one word.")
    writer = _Writer(tokenizer, write)
    started = time.monotonic()
    model.generate(ids, max_new_tokens=tokens, do_sample=False, streamer=writer)
    return writer.tokens / (time.monotonic() - started)
