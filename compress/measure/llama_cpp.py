"""llama.cpp as a runtime: an Engine over its C functions, as the package llama-cpp-python gives them.

Keys and values are kept in float16 and matrices multiplied as llama.cpp does it by default: what is measured is what a
user gets.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from compress.errors import CompressError
from compress.measure.engine import Engine
from compress.measure.runtimes import Runtime

#: Most tokens of a row: a cache for all that a model has been trained on can be larger than the model.
LONGEST = 4096
#: Tokens that are read at once.
BATCH = 512
#: ggml's number for the level of errors in its log, and those that it told.
_ERROR = 4
_said: deque[str] = deque(maxlen=20)


class LlamaCpp(Runtime):
    """llama.cpp, on `DIR/exports/gguf`."""

    name = "llama.cpp"
    exports: ClassVar[tuple[str, ...]] = ("gguf",)

    def missing(self) -> str | None:
        if find_spec("llama_cpp") is not None:
            return None
        return "llama-cpp-python, which runs llama.cpp, is not installed: pip install 'compress[llama-cpp]'."

    def can_load(self, folder: Path) -> bool:
        return len(list(folder.glob("*.gguf"))) == 1

    def open(self, folder: Path, *, threads: int, device: str) -> Engine:
        if reason := self.missing():
            raise CompressError(reason)
        files = list(folder.glob("*.gguf"))
        if len(files) != 1:
            raise CompressError(f"{folder} holds {len(files)} files *.gguf, and one is needed")
        return LlamaEngine(files[0], threads)


class LlamaEngine(Engine):
    """One GGUF file, one row at a time, on the CPU."""

    runtime = "llama.cpp"
    largest_batch = 1

    def __init__(self, file: Path, threads: int):
        import llama_cpp

        self.api: Any = llama_cpp
        _listen()
        _said.clear()
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self._context: Any = None
        self._model: Any = llama_cpp.llama_model_load_from_file(str(file).encode(), params)
        if not self._model:
            raise CompressError(f"{file} cannot be loaded: {last_words()}")
        self._vocabulary: Any = llama_cpp.llama_model_get_vocab(self._model)
        self.width = int(llama_cpp.llama_vocab_n_tokens(self._vocabulary))
        self.context = min(LONGEST, int(llama_cpp.llama_model_n_ctx_train(self._model)))
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = self.context, BATCH, BATCH
        settings.n_threads = settings.n_threads_batch = threads
        settings.no_perf = True
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise CompressError(f"{file} cannot be run: {last_words()}")
        self._batch: Any = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self._length = 0
        self._next: int | None = None

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        self._empty()
        parts = [self._read(ids[i : i + BATCH], every=True) for i in range(0, len(ids), BATCH)]
        self._empty()
        return np.concatenate(parts)

    def tokens(self, text: str, special: bool = False) -> list[int]:
        return _cut(self._vocabulary, text, special)

    def prefill(self, ids: Sequence[Sequence[int]]) -> None:
        (row,) = ids
        self._empty()
        for start in range(0, len(row), BATCH):
            last = self._read(row[start : start + BATCH], every=False)
        self._next = int(last[-1].argmax())

    def step(self) -> list[int]:
        if self._next is None:
            raise CompressError("step comes after prefill")
        token, self._next = self._next, None
        if self._length < (self.context or LONGEST):
            self._next = int(self._read([token], every=False)[-1].argmax())
        return [token]

    def close(self) -> None:
        if self._context:
            self.api.llama_batch_free(self._batch)
            self.api.llama_free(self._context)
        if self._model:
            self.api.llama_model_free(self._model)
        self._context = self._model = None

    def _empty(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self._context), True)
        self._length, self._next = 0, None

    def _read(self, ids: Sequence[int], every: bool) -> np.ndarray:
        """Appends tokens, `BATCH` at most; float32 logits after each of them, or `[1, vocabulary]` after the last."""
        if self._length + len(ids) > (self.context or LONGEST):
            raise CompressError(f"llama.cpp was opened for {self.context} tokens, and this text has more")
        batch = self._batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i] = int(token)
            batch.pos[i] = self._length + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = every or i == len(ids) - 1
        if self.api.llama_decode(self._context, batch):
            raise CompressError(f"llama.cpp could not read {len(ids)} tokens: {last_words()}")
        self._length += len(ids)
        rows = len(ids) if every else 1
        start = self.api.llama_get_logits_ith(self._context, -1 if not every else 0)
        return np.ctypeslib.as_array(start, shape=(rows, self.width)).copy()


def tokens_of_file(file: Path, texts: Sequence[str]) -> list[list[list[int]]]:
    """Each text's tokens, without and with those at its ends, by the tokenizer of a file that need hold nothing else.
    CompressError where the file cannot be loaded."""
    import llama_cpp

    _listen()
    _said.clear()
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.vocab_only, params.n_gpu_layers = True, 0
    model: Any = llama_cpp.llama_model_load_from_file(str(file).encode(), params)
    if not model:
        raise CompressError(f"its tokenizer cannot be loaded: {last_words()}")
    vocabulary: Any = llama_cpp.llama_model_get_vocab(model)
    found = [[_cut(vocabulary, text, special) for special in (False, True)] for text in texts]
    llama_cpp.llama_model_free(model)
    return found


def _cut(vocabulary: Any, text: str, special: bool) -> list[int]:
    import llama_cpp

    data = text.encode()
    found = (llama_cpp.llama_token * (len(data) + 8))()
    count: int = llama_cpp.llama_tokenize(vocabulary, data, len(data), found, len(found), special, True)
    if count < 0:
        raise CompressError("llama.cpp could not cut a text into tokens")
    return list(found[:count])


@cache
def _listen() -> Any:
    """Has the library tell its errors to `_said` and nothing to the terminal. It holds no reference to what it calls:
    that is kept here for good."""
    import llama_cpp

    def hear(level: int, text: bytes, _: Any) -> None:
        if level == _ERROR:
            _said.append(text.decode(errors="replace").strip())

    callback = llama_cpp.llama_log_callback(hear)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    return callback


def last_words() -> str:
    """The errors that the library told last, on one line."""
    return "; ".join(line for line in _said if line)[-300:] or "it did not say why"
