"""Plain float weights, which everything reads. Quantized layers are written rounded, but not packed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from compress.checkpoint import TensorSpec, write_checkpoint
from compress.formats.base import Contents, Format, foreign
from compress.formats.folder import write_ordinary_files
from compress.maths.grid import QuantSpec
from compress.nn.quant_embedding import packed_like
from compress.nn.quant_linear import packed_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Dense(Format):
    """One float tensor per weight, in the dtype of the model."""

    name = "dense"

    def refuses(self, dtype: torch.dtype, kinds: Mapping[str, str], specs: Mapping[str, QuantSpec]) -> str | None:
        rounding = [name for name, spec in specs.items() if spec.activations]
        if not rounding:
            return foreign(self.name, specs)
        why = f", which {rounding[0]}, a Conv1D, would need" if kinds.get(rounding[0]) == "Conv1D" else ""
        return (
            f"a folder of plain weights cannot have transformers round the inputs of layers{why}: round weights alone "
            "(rtn with bits: 8)."
        )

    def stored(self, contents: Contents) -> Sequence[TensorSpec]:
        return _published(contents.skeleton, *expanded(contents))[0]

    def write(self, folder: Path, contents: Contents) -> None:
        write_checkpoint(folder, *_published(contents.skeleton, *expanded(contents)))
        write_ordinary_files(folder, contents, self.name)


Tensors = tuple[list[TensorSpec], Callable[[str], Tensor]]


def expanded(contents: Contents, names: Collection[str] | None = None) -> Tensors:
    """The tensors as they are without packing (of the layers `names`; None: of any), and how to read them."""
    model = contents.skeleton
    names = contents.quantization if names is None else names
    tensors: list[TensorSpec] = []
    layers: dict[str, str] = {}
    for spec in contents.tensors:
        layer, _, last = spec.name.rpartition(".")
        if layer not in names or last == "bias":
            tensors.append(spec)
        elif last in ("weight_packed", "weight"):
            layers[f"{layer}.weight"] = layer
            shape = tuple(model.get_submodule(layer).get_parameter("weight").shape)
            tensors.append(TensorSpec(f"{layer}.weight", contents.dtype, shape))

    def read(name: str) -> Tensor:
        if name not in layers:
            return contents.read(name)
        layer = layers[name]
        spec = contents.quantization[layer]
        packed = packed_like(model.get_submodule(layer), spec)
        for part in packed_tensors(packed.in_features, packed.out_features, spec):
            packed._buffers[part] = contents.read(f"{layer}.{part}")
        weight = packed.dequantize(contents.dtype)
        return weight.t().contiguous() if packed.transposed else weight

    return tensors, read


def _published(model: PreTrainedModel, tensors: list[TensorSpec], read: Callable[[str], Tensor]) -> Tensors:
    """The same tensors by the names their family is published under, as other programs expect them.

    transformers merges some tensors as it loads them (Mixtral's experts into one). Each is split again on its own, so
    that memory stays at the largest. Where that cannot be done tensor by tensor, they keep transformers' names.
    """

    def original(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return revert_weight_conversion(model, tensors)  # type: ignore[no-any-return]

    stubs = {spec.name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in tensors}
    parts = {name: original({name: stub}) for name, stub in stubs.items()}
    single = {name: stub for part in parts.values() for name, stub in part.items()}
    whole = original(stubs)
    if {name: stub.shape for name, stub in single.items()} != {name: stub.shape for name, stub in whole.items()}:
        return tensors, read
    owner = {name: source for source, part in parts.items() for name in part}
    pending: dict[str, Tensor] = {}

    def read_part(name: str) -> Tensor:
        if name not in pending:
            pending.clear()
            pending.update(original({owner[name]: read(owner[name])}))
        return pending.pop(name)

    return [TensorSpec(name, stub.dtype, tuple(stub.shape)) for name, stub in single.items()], read_part
