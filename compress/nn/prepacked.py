"""Plain linear layers with their weights in the order that oneDNN multiplies fastest in, for models that only run.

torch's own `linear` takes bfloat16 weights in rows, and half of the memory's speed for a single token. oneDNN's order
gives the same results, to the last bit, in half the time; finding it once costs a copy of one weight at a time.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

#: Tokens for which oneDNN chooses the order. The order for many serves a single one as well; not the other way round.
_TOKENS = 512


class PrepackedLinear(nn.Module):  # type: ignore[misc]
    """y = x W^T + b, W bfloat16 [out, in] in oneDNN's order. `state_dict` has the weight in rows again."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _TOKENS)

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] in rows, made anew at each access."""
        return self.packed.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        """x bfloat16 [..., in] -> [..., out]."""
        if x.requires_grad and torch.is_grad_enabled():
            return nn.functional.linear(x, self.weight, self.bias)
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], ""))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight

    def __deepcopy__(self, memo: dict[int, Any]) -> PrepackedLinear:
        plain = nn.Linear(self.in_features, self.out_features, False, device="meta")
        plain.weight = nn.Parameter(self.weight, requires_grad=False)
        copied = PrepackedLinear(plain)
        copied.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        copied.train(self.training)
        return copied

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def why_not() -> str | None:
    """Why weights cannot be prepacked here, as the end of a sentence; None where they can."""
    if not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN"
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this processor has no instructions that oneDNN multiplies bfloat16 with"
    return None


def prepack(model: nn.Module) -> int:
    """Put `PrepackedLinear` in place of every plain bfloat16 `Linear` on the CPU; how many. An embedding tied to one
    keeps its table in rows, which is then held a second time."""
    found = [
        (name, layer)
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and layer.weight.dtype == torch.bfloat16 and layer.weight.device.type == "cpu"
    ]
    for name, layer in found:
        model.set_submodule(name, PrepackedLinear(layer))
        layer.weight = None  # before the next one is copied
    return len(found)
