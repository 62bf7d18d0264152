"""GGUF, the file that llama.cpp and what is built on it reads: weights, metadata and tokenizer in one.

Nothing is rounded here. Layers on a grid that ggml has blocks for become those blocks (`gguf_blocks`), code by code;
everything else is stored in the dtype it has, vectors in float32, as llama.cpp wants them.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from compress.checkpoint import TensorSpec
from compress.formats.base import Contents, Format, foreign, grid_of_its_own, own_grid_in_words
from compress.formats.gguf_blocks import block_kind, grids_in_words, pack_blocks, pack_super_blocks, row_bytes
from compress.formats.gguf_families import (
    FAMILIES,
    added_tensors,
    metadata,
    norm_values,
    place_of,
    refuses_family,
    rows_of,
)
from compress.formats.gguf_tokenizer import PROBE_TEXT, add_tokenizer, refuses_tokenizer
from compress.maths.grid import QuantSpec
from compress.maths.named_grids import TRELLIS
from compress.nn.quant_embedding import packed_like
from compress.nn.quant_linear import QuantLinear, packed_tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

FILE = "model.gguf"
_ALIGNMENT = 32
_DENSE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
#: `general.file_type` of a file that is mostly of one kind.
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
_FILE_TYPES |= {"Q2_K": 10, "Q3_K": 11, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18}
#: Nats a token, three times and more what was measured on trained models: see `GGUF.allowed_difference`.
_ALLOWED = {torch.float32: 0.01, torch.float16: 0.03, torch.bfloat16: 0.2}
_ALLOWED_BLOCKS = 0.2


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file: the one called `name` in the model, or the weight of its packed layer `layer`."""

    name: str
    kind: str
    shape: tuple[int, ...]
    layer: str | None = None

    @property
    def row_bytes(self) -> int:
        columns = self.shape[-1]
        return row_bytes(self.kind, columns) if self.layer else columns * (4 if self.kind == "F32" else 2)

    @property
    def nbytes(self) -> int:
        return self.row_bytes * (self.shape[0] if len(self.shape) > 1 else 1)


class GGUF(Format):
    """One file for llama.cpp. Holds dense weights, 4 and 8 bits on the grids of Q4_0, Q4_1 and Q8_0, and k-quants."""

    name = "gguf"
    runtime: ClassVar[str] = "llama.cpp"

    def refuses(self, dtype: torch.dtype, kinds: Mapping[str, str], specs: Mapping[str, QuantSpec]) -> str | None:
        if dtype not in _DENSE:
            return f"gguf holds float32, float16 and bfloat16, and the model is in {str(dtype).removeprefix('torch.')}."
        own = grid_of_its_own(specs)
        return foreign(self.name, specs) or (self.refuses_grid(own) if own else None)

    def refuses_grid(self, grid: str) -> str | None:
        return own_grid_in_words(self.name, grid) if grid == TRELLIS else None

    def refuses_model(self, contents: Contents) -> str | None:
        if find_spec("gguf") is None:
            return "gguf files are written by the package gguf, which is not installed: pip install 'compress[gguf]'."
        if reason := refuses_family(contents):
            return reason
        for layer, spec in contents.quantization.items():
            columns = int(contents.skeleton.get_submodule(layer).get_parameter("weight").shape[1])
            if block_kind(spec, columns) is None:
                kind = "symmetric" if spec.symmetric else "asymmetric"
                return (
                    f"gguf has no blocks for {layer}, {columns} columns in {spec.bits} bits, {kind}, group_size "
                    f"{spec.group_size}, scales in {spec.scale_dtype}: round with {grids_in_words()}."
                )
        return None

    def refuses_tokenizer(self, tokenizer: PreTrainedTokenizerBase | None, config: PretrainedConfig) -> str | None:
        if reason := refuses_tokenizer(tokenizer):
            return reason
        assert tokenizer is not None
        return _cut_otherwise(tokenizer, int(config.get_text_config().vocab_size))

    def stored(self, contents: Contents) -> list[TensorSpec]:
        """Sizes as bytes, since torch has no dtype for blocks."""
        return [TensorSpec(t.name, torch.uint8, (t.nbytes,)) for t in _tensors(contents)]

    def file_bytes(self, contents: Contents) -> int:
        """All tensors, padded; the tokenizer takes about as much as beside the model."""
        return sum(-(-t.nbytes // _ALIGNMENT) * _ALIGNMENT for t in _tensors(contents))

    def allowed_difference(self, contents: Contents) -> float:
        """llama.cpp rounds what enters a matrix of blocks to 8 bits in blocks of 32, what enters a matrix of 16 bits to
        those, and keys and values to float16; docs/decisions.md has what that comes to on trained models."""
        return _ALLOWED_BLOCKS if contents.quantization else _ALLOWED[contents.dtype]

    def write(self, folder: Path, contents: Contents) -> None:
        import gguf

        tensors = _tensors(contents)
        kinds = [t.kind for t in tensors if len(t.shape) > 1]
        writer = gguf.GGUFWriter(folder / FILE, FAMILIES[contents.architecture])
        try:
            writer.add_file_type(_FILE_TYPES[max(kinds, key=kinds.count)])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            metadata(contents, writer)
            if contents.tokenizer is not None:
                add_tokenizer(writer, contents.tokenizer, contents.config.vocab_size)
            place = place_of(contents)
            added = added_tensors(contents)
            for name, tensor in added.items():
                writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(np.float32), tensor.nbytes)
            for t in tensors:
                shape = (*t.shape[:-1], t.row_bytes)
                kind = gguf.GGMLQuantizationType[t.kind]
                writer.add_tensor_info(place(t.name), shape, np.dtype(np.uint8), t.nbytes, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in added.values():
                writer.write_tensor_data(tensor.numpy())
            for data in _data(contents, tensors):
                writer.write_tensor_data(data)
        finally:
            writer.close()


def _cut_otherwise(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> str | None:
    """Where llama.cpp, given a file with the tokenizer alone, cuts a text into other tokens; None where it does not, or
    is not installed."""
    from compress.measure.export_check import tokens_by_engine, tokens_differ
    from compress.registry import RUNTIMES

    if RUNTIMES.get(GGUF.runtime)().missing():
        return None
    import gguf

    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / FILE
        writer = gguf.GGUFWriter(file, FAMILIES["LlamaForCausalLM"])
        add_tokenizer(writer, tokenizer, vocabulary)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        said = tokens_differ(GGUF.runtime, tokenizer, [PROBE_TEXT], tokens_by_engine(file, [PROBE_TEXT]))
    return said and f"{said}."


def _tensors(contents: Contents) -> list[_Tensor]:
    """What the file holds, in the order of names, numbers in them by their size: the contents' own order depends on
    where the model was kept."""
    found = []
    for spec in contents.tensors:
        layer, _, last = spec.name.rpartition(".")
        if layer not in contents.quantization or last == "bias":
            kind = "F32" if len(spec.shape) < 2 else _DENSE[spec.dtype]
            found.append(_Tensor(spec.name, kind, spec.shape))
        elif last == "weight_packed":
            shape = tuple(contents.skeleton.get_submodule(layer).get_parameter("weight").shape)
            block = block_kind(contents.quantization[layer], shape[1])
            assert block is not None, layer
            found.append(_Tensor(f"{layer}.weight", block, shape, layer))
    return sorted(found, key=lambda t: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", t.name)])


def _data(contents: Contents, tensors: list[_Tensor]) -> Iterator[np.ndarray]:
    """The bytes of each tensor, one in memory at a time."""
    for t in tensors:
        rows = rows_of(contents, t.name)
        if t.layer is not None:
            yield _blocks(_unpacked(contents, t.layer), t.kind, rows)
            continue
        tensor = contents.read(t.name).cpu()
        tensor = tensor if rows is None else tensor[rows]
        if len(t.shape) < 2:
            tensor = norm_values(contents, t.name, tensor)
        yield tensor.contiguous().view(torch.uint8).numpy()


def _unpacked(contents: Contents, layer: str) -> QuantLinear:
    """A packed layer with its tensors."""
    spec = contents.quantization[layer]
    packed: Any = packed_like(contents.skeleton.get_submodule(layer), spec)
    for part in packed_tensors(packed.in_features, packed.out_features, spec):
        packed._buffers[part] = contents.read(f"{layer}.{part}").cpu()
    return packed  # type: ignore[no-any-return]


def _blocks(layer: QuantLinear, kind: str, rows: Tensor | None) -> np.ndarray:
    """The layer's weight as blocks, its rows in this order."""

    def ordered(tensor: Tensor) -> Tensor:
        return tensor if rows is None else tensor[rows]

    if layer.spec.super_block is None:
        codes, scale, zero = layer.codes()
        return pack_blocks(ordered(codes), ordered(scale), None if zero is None else ordered(zero), kind)
    number, multiples = map(ordered, layer.in_two("weight_scale"))
    minimum = None
    if layer.spec.minima:
        low, low_multiples = map(ordered, layer.in_two("weight_minimum"))
        minimum = (low, low_multiples)
    return pack_super_blocks(ordered(layer.stored_codes()), (number, multiples), minimum, kind)
