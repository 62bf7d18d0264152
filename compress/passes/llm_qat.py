"""LLM-QAT: the rounded model's weights learn from the original model's distribution, the rounding in the loop.

Liu et al.: "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models", 2023, arXiv 2305.17888: a float
weight behind each rounded one is trained through the rounding, against the full model's logits (section 2.1, 2.2). Here
it starts from codes that `gptq` or another pass chose, scales are trained as well, and the text is the recipe's. On a
trellis every forward finds the cheapest path of every row anew, and the start is half-way from the codes to the
original weights, where nothing but rounding has changed these.

It needs the memory of training a model: float weights, gradients, and two moments. For models that this is too much
for, `autoround` and `efficientqat` are the way.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from torch import Tensor

from compress.maths import trellis
from compress.nn.quant_linear import QuantLinear
from compress.passes.end_to_end import EndToEndPass

if TYPE_CHECKING:
    from compress.nn.trained import RowTrained, Trained, WeightTrained
    from compress.shapes import ModelShape
    from compress.training_schedule import Group


class LLMQAT(EndToEndPass):
    """Train the weights of a rounded model through its rounding, with scales and norms, on the original's logits."""

    name: ClassVar[str] = "llm_qat"

    learning_rate: float = Field(
        default=2e-2,
        gt=0,
        le=1,
        description="Peak learning rate of weights, in steps of the grid: a layer's mean scale; on a trellis, where "
        "that is a standard deviation, 4 / 2**bits of it.",
    )

    dampening: float = Field(
        default=0.0,
        ge=0,
        description="On a trellis: how far a weight is drawn back, after a step, to the number that it rounds to, in "
        "units of the learning rate, for each step of the grid that it is away. Weights else gather between two "
        "numbers, and their coming and going is noise that grows with the length of a run.",
    )

    def trained(self, layer: QuantLinear, sparse: bool, original: Tensor | None) -> WeightTrained | RowTrained:
        """From the middle of integers' cells; on a trellis from near the original weight, where that is known."""
        from compress.nn.trained import weight_trained

        return weight_trained(layer, original if layer.spec.trellis else None)

    def groups(self, layer: Trained) -> list[Group]:
        """Weight and scale at rates relative to the scale: a step of the grid is as far for every layer."""
        from compress.nn.trained import RowTrained, WeightTrained
        from compress.training_schedule import Group

        assert isinstance(layer, WeightTrained | RowTrained)
        step, size, low = layer.units()
        settle = None
        if self.dampening and isinstance(layer, RowTrained):
            settle = partial(_settle, layer, self.dampening / step)
        groups = [
            Group([layer.weight], self.learning_rate * step, settle),
            Group([layer.scale], self.scale_learning_rate * size),
        ]
        if layer.zero is not None:
            groups.append(Group([layer.zero], self.scale_learning_rate * low))
        return groups

    def trained_bytes(self, shape: ModelShape) -> int:
        packed = [module for module in shape.handle.model.modules() if isinstance(module, QuantLinear)]
        values = sum(m.out_features * (m.in_features + m.spec.groups(m.in_features)) for m in packed)
        # the rounded weight of each layer is kept for the gradient; on a trellis, what it was rounded from and how near
        kept = sum((7 if m.spec.trellis else 4) * m.out_features * m.in_features for m in packed)
        paths = [trellis.search_bytes(m.in_features, m.spec.bits) for m in packed if m.spec.trellis]
        return 16 * values + kept + max(paths, default=0)


def _settle(layer: RowTrained, dampening: float, rows: Tensor, rate: float) -> None:
    layer.settle(rows, min(1.0, dampening * rate))
