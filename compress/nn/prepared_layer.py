"""What a kernel keeps beside a packed layer that it serves, made when the layer is first called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from compress.nn.quant_linear import QuantLinear


class PreparedLayer:
    """Made from a layer's codes and scales, and true as long as it holds those. One a layer, in `layer.prepared`."""

    def __init__(self, layer: QuantLinear):
        self.packed, self.scale = layer.weight_packed, layer.weight_scale

    @classmethod
    def of(cls, layer: QuantLinear) -> Self:
        """That of a layer, made where it is not there, is another kernel's, or is no longer true."""
        found = layer.prepared
        if not isinstance(found, cls) or not found.holds(layer):
            found = layer.prepared = cls(layer)
        return found

    def holds(self, layer: QuantLinear) -> bool:
        """Whether it was made from these tensors: a checkpoint may have put others in their place."""
        buffers = layer._buffers  # past nn.Module's slow look-up: this is asked at every call
        return buffers["weight_packed"] is self.packed and buffers["weight_scale"] is self.scale

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the layer has other tensors, and is prepared anew when it is called."""
        return _nothing, ()


def _nothing() -> None:
    return None
