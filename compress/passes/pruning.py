"""What all passes that set weights to zero have in common: how many, and where they are counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator
from torch import Tensor

from compress.maths.masks import check_columns, parse_pattern, parse_sparsity
from compress.passes.base import BlockPass, LayerShape

if TYPE_CHECKING:
    from compress.model import Layer

Sparsity = Annotated[float, BeforeValidator(parse_sparsity), Field(ge=0, lt=1)]
Pattern = Annotated[str, BeforeValidator(parse_pattern)]


def pruned(weight: Tensor, keep: Tensor, scores: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The weight with exact zeros where `keep` is False, its share of zeros, and the share of squared scores lost."""
    result = weight.masked_fill(~keep, 0.0)
    squared = scores.square()
    total = float(squared.sum())
    lost = float(squared.masked_fill_(keep, 0.0).sum())
    return result, {"sparsity": float((result == 0).float().mean()), "loss": lost / total if total else 0.0}


class PruningPass(BlockPass):
    """A block pass that leaves weights dense, with zeros among them."""

    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "sparse"})
    leaves: ClassVar[str] = "sparse"

    sparsity: Sparsity | None = Field(
        default=None, description='Share of the weights to set to zero, 0.5 or "50%"; 0.5 if no pattern is given.'
    )
    pattern: Pattern | None = Field(
        default=None, description='Instead of a share: "2:4" keeps 2 of every 4 neighbours in a row. Quote it.'
    )

    #: `block.layer` -> share of zeros, in the copy of a pass with an allocation that does the work.
    _rates: Mapping[str, float] | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _one_target(cls, options: Any) -> Any:
        """Sparsity 0.5 if neither is given; both: ValueError."""
        if not isinstance(options, dict):
            return options
        if options.get("pattern") is None and options.get("sparsity") is None:
            return {**options, "sparsity": 0.5}
        if options.get("pattern") is not None and options.get("sparsity") is not None:
            raise ValueError("sparsity and pattern exclude each other: the pattern says how many weights stay")
        return options

    def spec_of(self, layer: LayerShape) -> None:
        """Stays dense. StartError if the pattern does not divide the columns."""
        check_columns(self.pattern, layer.inputs)

    def rate_of(self, layer: Layer) -> float | None:
        """The share of zeros of this layer; None where a pattern says it."""
        if self._rates is None or layer.block is None:
            return self.sparsity
        return self._rates[f"{layer.block.name}.{layer.name}"]

    def allocated(self, rates: Mapping[str, float]) -> Self:
        """The same pass, with a share of zeros for each layer (`block.layer`)."""
        copy = self.model_copy()
        copy._rates = rates
        return copy
