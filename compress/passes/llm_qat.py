"""LLM-QAT: the rounded model's weights learn from the original model's distribution, the rounding in the loop.

Liu et al.: "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models", 2023, arXiv 2305.17888: a float
weight behind each rounded one is trained through the rounding, against the full model's logits (section 2.1, 2.2). Here
it starts from codes that `gptq` or another pass chose, scales are trained as well, and the text is the recipe's.

It needs the memory of training a model: float weights, gradients, and two moments. For models that this is too much
for, `autoround` and `efficientqat` are the way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from compress.nn.quant_linear import QuantLinear
from compress.passes.end_to_end import EndToEndPass

if TYPE_CHECKING:
    from compress.nn.trained import Trained, WeightTrained
    from compress.shapes import ModelShape
    from compress.training import Group

#: How many cells of the grid a weight could cross at the peak rate, and what the rate is at least and at most.
CELLS, SLOWEST, FASTEST = 8.0, 5e-3, 2e-2


class LLMQAT(EndToEndPass):
    """Train the weights of a rounded model through its rounding, with scales and norms, on the original's logits."""

    name: ClassVar[str] = "llm_qat"
    #: Without momentum: a weight beside a border of its cell goes to and fro, and holds the mean that its neighbours
    #: need. With it the answer comes late and swings wider (see the log of benchmarks).
    betas: ClassVar[tuple[float, float]] = (0.0, 0.99)

    learning_rate: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Peak learning rate of weights, in units of a layer's mean scale. Default: 8 / steps, at least "
        "0.005 and at most 0.02.",
    )
    batch_size: int = Field(default=4, ge=1, description="Windows of text in a step.")

    def trained(self, layer: QuantLinear, sparse: bool) -> WeightTrained:
        from compress.nn.trained import WeightTrained

        return WeightTrained(layer)

    def groups(self, layer: Trained, steps: int) -> list[Group]:
        """Weight and scale at rates relative to the scale: a step of the grid is as far for every layer."""
        from compress.nn.trained import WeightTrained
        from compress.training import Group

        assert isinstance(layer, WeightTrained)
        step, size, low = layer.units()
        groups = [
            Group([layer.weight], self._rate(steps) * step),
            Group([layer.scale], self.scale_learning_rate * size),
        ]
        if layer.zero is not None:
            groups.append(Group([layer.zero], self.scale_learning_rate * low))
        return groups

    def _rate(self, steps: int) -> float:
        """Slow is better, as long as a weight can cross a few cells of the grid."""
        return self.learning_rate or min(max(CELLS / steps, SLOWEST), FASTEST)

    def trained_bytes(self, shape: ModelShape) -> int:
        packed = [module for module in shape.handle.model.modules() if isinstance(module, QuantLinear)]
        values = sum(m.out_features * (m.in_features + m.spec.groups(m.in_features)) for m in packed)
        # the rounded weight of each layer is kept for the gradient
        return 16 * values + 4 * sum(m.out_features * m.in_features for m in packed)
