"""ONNX, as ONNX Runtime GenAI opens it: a graph, the weights beside it, the tokenizer and genai_config.json.

The folder holds no config.json, so that nothing takes it for a model of transformers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

import torch
from torch import Tensor

from compress.checkpoint import TensorSpec, atomic_write_text
from compress.errors import StartError
from compress.formats.base import Contents, Format, foreign, grid_of_its_own, own_grid_in_words
from compress.formats.folder import write_record, write_tokenizer
from compress.formats.onnx_blocks import ACCURACY_LEVEL, blocks, held_shape, packed_zeros, refuses_grid, repeated
from compress.maths.grid import QuantSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from compress.formats.onnx_graph import Decoder

MODEL, DATA, CONFIG = "model.onnx", "model.onnx.data", "genai_config.json"
PACKAGES = ("onnx", "onnxruntime", "onnxruntime_genai")
MISSING = "onnx, onnxruntime and onnxruntime-genai write and run it: pip install 'compress[onnx]'."
#: Large weights start at pages, so that they can be mapped; others where a vector register would like them to.
LARGE, PAGE, VECTOR = 1 << 20, 4096, 64
#: Most tokens that GenAI makes room for where nobody says how many: it does so before the first one.
MAX_LENGTH = 4096
#: A node or a value in the graph takes about so many bytes; a block of the model has about 25 of them.
BLOCK_BYTES = 6000


class Onnx(Format):
    """Our codes and scales in `MatMulNBits` of 4 or 8 bits; float32 for the rest."""

    name = "onnx"
    runtime: ClassVar[str | None] = "onnxruntime"

    def refuses(self, dtype: torch.dtype, kinds: Mapping[str, str], specs: Mapping[str, QuantSpec]) -> str | None:
        if reason := foreign(self.name, specs):
            return reason
        if own := grid_of_its_own(specs):
            return self.refuses_grid(own)
        return next((reason for name, spec in specs.items() if (reason := refuses_grid(spec, name))), None)

    def refuses_grid(self, grid: str) -> str | None:
        return own_grid_in_words(self.name, grid)

    def refuses_model(self, contents: Contents) -> str | None:
        if any(find_spec(package) is None for package in PACKAGES):
            return f"onnx cannot be written here: {MISSING}"
        from compress.formats.onnx_graph import refuses_decoder

        return refuses_decoder(contents.config, contents.architecture)

    def refuses_tokenizer(self, tokenizer: PreTrainedTokenizerBase | None, config: PretrainedConfig) -> str | None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if tokenizer is None or backend is None:
            return None if tokenizer is None else "onnx needs a tokenizer with a tokenizer.json, and this has none."
        kind = type(backend.model).__name__
        if kind == "WordLevel":
            return f"ONNX Runtime GenAI reads tokenizers of the kinds BPE and Unigram, and the model's is {kind}."
        return None

    def allowed_difference(self, contents: Contents) -> float:
        """What enters a packed layer is rounded to 8 bits: 0.01 to 0.09 nats on trained models, the more the text
        surprises them."""
        return 0.2 if contents.quantization else self.allowed_exactly(contents)

    def stored(self, contents: Contents) -> Sequence[TensorSpec]:
        shapes = {spec.name: held_shape(spec, contents) for spec in contents.tensors}
        held = [TensorSpec(name, *shape) for name, shape in shapes.items() if shape is not None]
        return [*held, *_decoder(contents).table_specs()]

    def file_bytes(self, contents: Contents) -> int:
        end = 0
        for spec in self.stored(contents):
            end = _aligned(end, _bytes(spec)) + _bytes(spec)
        return end + BLOCK_BYTES * int(contents.config.num_hidden_layers)

    def write(self, folder: Path, contents: Contents) -> None:
        import onnx

        decoder = _decoder(contents)
        model = decoder.build()
        with open(folder / DATA, "wb") as file:
            for spec in contents.tensors:
                if held_shape(spec, contents) is not None:
                    tensor = _held(spec.name, contents.read(spec.name).cpu(), contents, decoder.norm_offset)
                    decoder.place(model.graph, spec.name, tensor, (DATA, *_append(file, tensor)))
            for name, table in decoder.rotary.items():
                decoder.place(model.graph, name, table, (DATA, *_append(file, table)))
        onnx.save_model(model, folder / MODEL)
        atomic_write_text(folder / CONFIG, json.dumps(genai_config(contents, decoder), indent=2) + "\n")
        write_tokenizer(folder, contents)
        write_record(folder, contents, self.name)


def genai_config(contents: Contents, decoder: Decoder) -> dict[str, Any]:
    """What ONNX Runtime GenAI is told of the model."""
    config, generation = contents.config, contents.generation_config
    tokens: dict[str, Any] = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(generation, key, None)
        value = getattr(config, key, None) if value is None else value
        if value is not None:
            tokens[key] = value
    end = tokens.get("eos_token_id", 0)
    tokens.setdefault("pad_token_id", end[0] if isinstance(end, list) else end)
    search = {"do_sample": False, "max_length": min(decoder.context, MAX_LENGTH), "past_present_share_buffer": True}
    for key in ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty"):
        if (value := getattr(generation, key, None)) is not None:
            search[key] = value
    places = {} if decoder.fused_rotary else {"position_ids": "position_ids"}
    return {
        "model": {
            **tokens,
            "context_length": decoder.context,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": MODEL,
                "head_size": decoder.head_size,
                "hidden_size": int(config.hidden_size),
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    **places,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": decoder.heads,
                "num_hidden_layers": decoder.layers,
                "num_key_value_heads": decoder.kv_heads,
            },
            "type": config.model_type,
            "vocab_size": int(config.vocab_size),
        },
        "search": search,
    }


def _decoder(contents: Contents) -> Decoder:
    if find_spec("onnx") is None:
        raise StartError(f"onnx cannot be written here: {MISSING}")
    from compress.formats.onnx_graph import Decoder

    return Decoder(contents.skeleton, contents.quantization, ACCURACY_LEVEL)


def _held(name: str, tensor: Tensor, contents: Contents, norm_offset: float) -> Tensor:
    """A tensor of the model as the graph takes it."""
    layer, _, last = name.rpartition(".")
    spec = contents.quantization.get(layer)
    if spec is None or last == "bias":
        norm = last == "weight" and tensor.dim() == 1
        return (tensor.float() + norm_offset if norm else tensor.float()).contiguous()
    rows, columns = contents.skeleton.get_submodule(layer).weight.shape
    if last in ("weight_packed", "weight"):
        return blocks(tensor, spec, columns)
    if last == "weight_scale":
        return repeated(tensor.float(), spec, columns)
    return packed_zeros(tensor, spec, rows, columns)


def _append(file: BinaryIO, tensor: Tensor) -> tuple[int, int]:
    """Writes a tensor's bytes at the file's end, or a little after it; (first byte, bytes)."""
    size = tensor.numel() * tensor.element_size()
    start = _aligned(file.tell(), size)
    file.seek(start)
    tensor.numpy().tofile(file)
    return start, size


def _aligned(end: int, size: int) -> int:
    """The first place from `end` on for a tensor of so many bytes."""
    step = PAGE if size >= LARGE else VECTOR
    return -(-end // step) * step


def _bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * int(spec.dtype.itemsize)
