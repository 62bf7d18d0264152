"""ONNX Runtime GenAI as a runtime: it opens `DIR/exports/onnx`, as the programs do that the export is for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.measure.engine import Engine
from compress.measure.runtimes import Logits, Runtime, first_line

if TYPE_CHECKING:
    import numpy as np

CONFIG = "genai_config.json"
#: Tokens that a generator has room for beyond the prompt; it gets more when they are used up.
ROOM = 256


class OnnxRuntime(Runtime):
    """ONNX Runtime GenAI on the CPU."""

    name = "onnxruntime"
    exports = ("onnx",)

    def missing(self) -> str | None:
        if find_spec("onnxruntime_genai") is not None:
            return None
        return "onnxruntime-genai is not installed: pip install 'compress[onnx]'."

    def can_load(self, folder: Path) -> bool:
        return (folder / CONFIG).is_file()

    def open(self, folder: Path, *, threads: int, device: str) -> Engine:
        if why := self.missing():
            raise CompressError(why)
        if device != "cpu":
            raise CompressError(f"onnxruntime runs on the CPU here, not on {device}: use device: cpu.")
        return OnnxEngine(folder, threads)

    def exact(self, folder: Path, *, threads: int) -> Logits | None:
        return exact_session(folder, threads)


class OnnxEngine(Engine):
    """A model in ONNX Runtime GenAI. Keys and values lie in room that is made for `ROOM` tokens beyond the prompt."""

    runtime = "onnxruntime"
    largest_batch = 1 << 16

    def __init__(self, folder: Path, threads: int):
        import onnxruntime_genai as genai

        self.folder, self.threads, self._genai = folder, threads, genai
        try:
            told = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model"]
            config = genai.Config(str(folder))
            options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            self._model: Any = genai.Model(config)
        except Exception as error:  # GenAI has one class for all that goes wrong, and JSON two
            raise CompressError(f"onnxruntime cannot load {folder}: {first_line(error)}") from error
        self.context = int(told["context_length"])
        decoder = told["decoder"]
        heads = decoder["num_hidden_layers"] * decoder["num_key_value_heads"]
        self._token_bytes = 2 * 4 * int(heads * decoder["head_size"])  # keys and values, float32
        self._generator: Any = None
        self._unread: list[int] = []  # the tokens written last
        self._rows = self._room = 0
        self._tokenizer: Any = None

    def logits(self, ids: Sequence[int]) -> np.ndarray | None:
        self._empty()
        self._read([list(ids)], len(ids))
        import numpy as np

        found = np.array(self._generator.get_output("logits")[0], dtype=np.float32)
        self._empty()
        return found

    def tokens(self, text: str, special: bool = False) -> list[int] | None:
        if self._tokenizer is None:
            self._tokenizer = self._genai.Tokenizer(self._model)
        self._tokenizer.update_options(add_special_tokens=str(special).lower())
        return [int(token) for token in self._tokenizer.encode(text)]

    def prefill(self, ids: Sequence[Sequence[int]]) -> None:
        length = len(ids[0])
        if self._generator is not None and self._rows == len(ids) and self._room >= length + ROOM:
            self._generator.rewind_to(0)
            self._unread = []
            self._append(ids)
        else:
            self._empty()
            self._read(ids, min(self.context or length + ROOM, length + ROOM))

    def step(self) -> list[int]:
        """Of one row, chosen here, from GenAI's logits: its own search ends at a token that ends texts. It alone writes
        several rows; there, such tokens are never chosen."""
        if self._generator is None:
            raise CompressError("An engine has to read a prompt before it can write.")
        if self._rows > 1:
            if self._generator.token_count() >= self._room:
                self._grow()
            self._generator.generate_next_token()
            return [int(token) for token in self._generator.get_next_tokens()]
        if self._unread:
            if self._generator.token_count() >= self._room:
                self._grow()
            self._append([[token] for token in self._unread])
        logits = self._generator.get_logits()
        self._unread = [int(token) for token in logits.reshape(self._rows, -1).argmax(-1)]
        return self._unread

    def _grow(self) -> None:
        """More room: what was read and written so far is read again."""
        if self.context is not None and self._room >= self.context:
            raise CompressError(f"{self.folder} has room for {self.context} tokens, and they are used up.")
        rows = [self._generator.get_sequence(row).tolist() for row in range(self._rows)]
        room, unread = self._room + 4 * ROOM, self._unread
        self._empty()
        self._read(rows, min(self.context or room, room))
        self._unread = unread

    def _read(self, ids: Sequence[Sequence[int]], room: int) -> None:
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(
            batch_size=len(ids), max_length=room, min_length=room, do_sample=False, repetition_penalty=1.0
        )
        self._generator, self._rows, self._room = self._genai.Generator(self._model, params), len(ids), room
        self._append(ids)

    def _append(self, ids: Sequence[Sequence[int]]) -> None:
        import numpy as np

        self._generator.append_tokens(np.asarray([list(row) for row in ids], dtype=np.int32))

    def _empty(self) -> None:
        self._generator, self._unread, self._rows, self._room = None, [], 0, 0

    def cache_bytes(self) -> int | None:
        return self._rows * self._room * self._token_bytes if self._generator is not None else None

    def close(self) -> None:
        self._empty()
        self._tokenizer = self._model = None


def exact_session(folder: Path, threads: int) -> Logits:
    """The export without the rounding of its layers' inputs.

    Plain ONNX Runtime runs it, from the same weights, with each `MatMulNBits` at the level that multiplies float32.
    """
    import numpy as np
    import onnx
    import onnxruntime

    from compress.formats.onnx import MODEL
    from compress.formats.onnx_blocks import EXACT_LEVEL

    model = onnx.load(folder / MODEL, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = EXACT_LEVEL
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(tokens: Sequence[int]) -> np.ndarray:
        ids = np.asarray([list(tokens)], dtype=np.int64)
        feeds: dict[str, np.ndarray] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        for each in session.get_inputs():
            if each.name == "position_ids":
                feeds[each.name] = np.arange(ids.shape[1], dtype=np.int64)[None]
            elif each.name.startswith("past_key_values"):
                feeds[each.name] = np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32)
        found: np.ndarray = session.run(["logits"], feeds)[0][0]
        return found

    return run
