"""peft's LoRA layer on bases that peft does not know: packed layers, and weights whose zeros must stay.

Hu et al.: "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv 2106.09685: y = W x + s B A x, A being
[r, in] and B [out, r]; Dettmers et al.: "QLoRA", 2023, arXiv 2305.14314: W stays packed.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import Linear
from torch import Tensor
from torch.nn import functional

from compress.nn.quant_linear import QuantLinear


class PackedLora(Linear):  # type: ignore[misc]
    """An adapter beside a packed layer, which computes, and passes gradients on, by itself."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        """peft warns of layers that it does not know."""
        if isinstance(module, QuantLinear):
            return module.in_features, module.out_features
        found: tuple[int, int] = super()._get_in_out_features(module)
        return found


class MaskedLora(PackedLora):
    """An adapter that changes only weights that are not 0: y = (W + M * s B A) x, M [out, in] being 1 where W is not 0.
    Merged, it leaves every zero. It takes the product B A in full while it computes."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """M * s B A, in the base weight's own layout."""
        delta: Tensor = super().get_delta_weight(adapter)
        return delta * (self.get_base_layer().weight != 0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for adapter in self.active_adapters if not self.disable_adapters else ():
            if adapter in self.lora_A:
                delta = self.get_delta_weight(adapter)
                given = self.lora_dropout[adapter](x.to(delta.dtype))
                result = result + functional.linear(given, delta.t() if self.fan_in_fan_out else delta)
        return result.to(dtype)
