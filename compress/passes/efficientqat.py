"""EfficientQAT, its end-to-end stage: scales, zero points and norms learn from the original model; codes stay packed.

Chen et al.: "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models", 2024, arXiv 2407.11062,
section 3.3. The paper trains the step sizes on the text's own labels; here scales, zero points and norms are trained on
the original model's distribution, which is what the rounded model is to keep.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from compress.nn.quant_linear import QuantLinear
from compress.passes.end_to_end import EndToEndPass

if TYPE_CHECKING:
    from compress.nn.trained import ScaleTrained, Trained
    from compress.shapes import ModelShape
    from compress.training_schedule import Group


class EfficientQAT(EndToEndPass):
    """Train scales, zero points and norms of a rounded model against the original's logits; the codes stay packed."""

    name: ClassVar[str] = "efficientqat"

    accepts: ClassVar[frozenset[str]] = frozenset({"quantized", "sparse"})

    def trained(self, layer: QuantLinear, sparse: bool, original: Tensor | None) -> ScaleTrained:
        """A zero of a sparse model is a code equal to its zero point, which then must not move."""
        from compress.nn.trained import ScaleTrained

        return ScaleTrained(layer, zero_trained=not sparse)

    def groups(self, layer: Trained) -> list[Group]:
        """The scale, at a rate relative to its size; the zero point, which is counted in steps of the grid."""
        from compress.nn.trained import ScaleTrained
        from compress.training_schedule import Group

        assert isinstance(layer, ScaleTrained)
        _, size, low = layer.units()
        groups = [Group([layer.scale], self.scale_learning_rate * size)]
        if layer.zero is not None and layer.zero_trained:
            groups.append(Group([layer.zero], self.scale_learning_rate * low))
        return groups

    def trained_bytes(self, shape: ModelShape) -> int:
        """Of one layer at a time, the weight, its codes as floats and its gradient are there as well."""
        packed = [module for module in shape.handle.model.modules() if isinstance(module, QuantLinear)]
        values = sum(m.out_features * m.spec.groups(m.in_features) * (1 if m.spec.symmetric else 2) for m in packed)
        return 16 * values + 16 * max((m.out_features * m.in_features for m in packed), default=0)
