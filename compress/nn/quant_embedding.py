"""An embedding whose table stays packed integers, and a head that runs from that same table.

A table [vocabulary, hidden] is stored as `QuantLinear` stores a weight [out, in], so a head that is tied to it needs
tensors of no kind: it multiplies with the embedding's. Looking tokens up unpacks their rows and no others.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.errors import StartError
from compress.maths import grid, packing
from compress.maths.grid import QuantSpec
from compress.nn import kernels
from compress.nn.quant_linear import QuantLinear


class QuantEmbedding(QuantLinear):
    """`ids [...] -> rows [..., in_features]` of a packed table of `out_features` rows.

    Buffers are those of `QuantLinear`. `factor` is what some families multiply the rows with (Gemma: the root of the
    hidden size), as their own module holds it: a number, or a tensor, which is cast to the rows' dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: QuantSpec,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        transposed: bool = False,
    ):
        super().__init__(in_features, out_features, spec, bias, dtype, device, transposed)
        self.register_buffer("factor", None, persistent=False)
        self.number: float | None = None

    @classmethod
    def like(cls, module: nn.Module, spec: QuantSpec, device: torch.device | str = "meta") -> QuantEmbedding:
        """An empty table with the shape, dtype and factor of an `nn.Embedding`. StartError for one that does more
        than look rows up and scale them."""
        if isinstance(module, QuantEmbedding):
            empty = cls(module.in_features, module.out_features, spec, False, module.dtype, device)
            empty.factor, empty.number = module.factor, module.number
            return empty
        factor = getattr(module, "embed_scale", None)
        known = type(module).forward is nn.Embedding.forward or (
            factor is not None and len([*module.parameters()]) == 1
        )
        if not isinstance(module, nn.Embedding) or module.max_norm is not None or not known:
            raise StartError(f"the embedding is a {type(module).__name__}, which does more than look rows up")
        rows, columns = module.weight.shape
        empty = cls(columns, rows, spec, False, module.weight.dtype, device)
        if isinstance(factor, Tensor):
            empty.factor = factor
        else:
            empty.number = factor
        return empty

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `[n, in_features]` of the table in the layer's dtype, for ids `[n]`: `dequantize()[ids]`, bit by bit."""
        compute = self.dtype if self.spec.symmetric else self.weight_scale.dtype
        codes = packing.unpack(self.weight_packed[ids], self.spec.bits, self.in_features)
        zero = None
        if self.weight_zero_point is not None:
            zero = packing.unpack_some_rows(self.weight_zero_point, self.spec.bits, ids)
        return grid.dequantize(codes, self.weight_scale[ids], zero, self.spec, compute).to(self.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [...] -> [..., in_features]."""
        rows = self.rows(ids.reshape(-1)).unflatten(0, ids.shape)
        if self.factor is not None:
            return rows * self.factor.to(rows.dtype)
        return rows if self.number is None else rows * self.number


class TiedHead(nn.Module):  # type: ignore[misc]
    """`hidden [..., in] -> logits [..., vocabulary]` with the packed table of an embedding; it owns a bias at most."""

    def __init__(self, table: QuantEmbedding, bias: nn.Parameter | None = None):
        super().__init__()
        # In __dict__, not registered: the tensors are the embedding's, and the state dict has them once.
        self.__dict__["table"] = table
        self.bias = bias
        self.in_features, self.out_features = table.in_features, table.out_features

    @property
    def weight(self) -> Tensor:
        """The dequantized table, made anew at each access."""
        return self.__dict__["table"].weight

    def forward(self, x: Tensor) -> Tensor:
        table = self.__dict__["table"]
        out = kernels.choose(table, x)(table, x)
        return out if self.bias is None else out + self.bias.to(out.dtype)


def packed_like(module: nn.Module, spec: QuantSpec) -> QuantLinear:
    """An empty packed layer, on the meta device, for a `Linear`, a `Conv1D`, an `Embedding` or a packed layer."""
    embedding = isinstance(module, nn.Embedding | QuantEmbedding)
    return QuantEmbedding.like(module, spec) if embedding else QuantLinear.like(module, spec)
