"""Rounding the inputs of a layer while it runs: one scale for each token, found when the token comes.

A token's scale is its largest magnitude over half the span of the codes (127.5 for int8, 448 for float8), and codes are
the nearest numbers of the type. Every step is taken in the dtype of the input, as compressed-tensors does it in plain
transformers, so that both make the same codes of the same input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.maths.grid import STORED_DTYPES, QuantSpec


def token_scales(x: Tensor, spec: QuantSpec) -> Tensor:
    """Scales `[..., 1]` of the tokens of `x` `[..., in]`, in its dtype; the dtype's epsilon for a token of zeros."""
    scale = x.abs().amax(-1, keepdim=True) / spec.half_range
    return scale.masked_fill_(scale == 0, torch.finfo(x.dtype).eps)


def token_codes(x: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Codes of `x` `[..., in]`, int8 or float8_e4m3fn, for `scale` `[..., 1]`.

    >>> spec = QuantSpec(8, stored="int8")
    >>> x = torch.tensor([[-2.55, 0.03, 1.0]])     # the scale is 2.55 / 127.5 = 0.02
    >>> token_codes(x, token_scales(x, spec), spec).tolist()
    [[-128, 2, 50]]
    """
    codes = x / scale
    if spec.stored == "float8":
        return codes.clamp_(-spec.half_range, spec.half_range).to(STORED_DTYPES[spec.stored])
    return codes.clamp_(spec.qmin, spec.qmax).round_().to(STORED_DTYPES[spec.stored])


def rounded_tokens(x: Tensor, spec: QuantSpec) -> Tensor:
    """`x` `[..., in]` with every token rounded, in its dtype. Gradients pass as if nothing were rounded."""
    with torch.no_grad():
        scale = token_scales(x, spec)
        rounded = token_codes(x, scale, spec).to(x.dtype).mul_(scale)
    return x + (rounded - x).detach() if x.requires_grad else rounded
