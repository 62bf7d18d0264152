"""In what precision matrices are multiplied while a model is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

if TYPE_CHECKING:
    import torch

    from compress.model import ModelHandle

Precision = Annotated[
    Literal["auto", "float32", "bfloat16"],
    Field(
        description="Of matrix products in training; auto: bfloat16 for 16-bit models and where the hardware has it."
    ),
]


def trains_in_bf16(precision: str, model: ModelHandle) -> bool:
    """Whether products are bfloat16 ones (torch's autocast) for this model, where it is."""
    import torch

    if precision == "auto":
        return model.dtype != torch.float32 or bf16_is_fast(model.device)
    return precision == "bfloat16"


def bf16_is_fast(device: str | torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices itself."""
    import torch

    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
