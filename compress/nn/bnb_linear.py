"""Layers of bitsandbytes: 4-bit codes on a curve (NF4, FP4) or 8-bit rows (LLM.int8), computed by bitsandbytes.

Dettmers, Pagnoni, Holtzman, Zettlemoyer: "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, arXiv 2305.14314,
section 3 (NF4, double quantization). Dettmers, Lewis, Belkada, Zettlemoyer: "LLM.int8()", 2022, arXiv 2208.07339.

A layer's tensors carry the names that transformers stores them by, so the state dict of a model with such layers is the
checkpoint. On some processors bitsandbytes repacks a layer's codes and rounds their scales at the first forward, and
does not undo that to the bit: it is only ever given copies of what is stored here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import CompressError, StartError
from compress.maths.grid import QuantSpec, row_chunks
from compress.nn.quant_linear import QuantLinear

MISSING = "it needs the package bitsandbytes, which is not installed: pip install 'compress[bitsandbytes]'."
BLOCK, NESTED_BLOCK = 64, 256  # weights that share a scale; scales that share one, with double quantization
ROWS = 32  # its kernel for processors with AVX512-BF16 works on so many rows at once
STATE_BYTES = 256  # its description of a layer is JSON of this length or less: padded, a file's size can be planned


@dataclass(frozen=True)
class BnbSpec(QuantSpec):
    """`code`: nf4, fp4 or int8. `double`: the scales of 4-bit codes are rounded to 8 bits."""

    code: str = "nf4"
    double: bool = True

    @classmethod
    def of(cls, code: str, double: bool) -> BnbSpec:
        if code == "int8":
            return cls(8, -1, True, "float32", code=code, double=False)
        return cls(4, BLOCK, True, "float32", code=code, double=double)

    def columns_per_group(self, columns: int) -> int:
        """As of any grid. StartError where a row is not made of whole blocks."""
        if self.bits == 4 and columns % BLOCK:
            raise StartError(
                f"{self.code} needs rows of a multiple of {BLOCK} weights, and these have {columns}: name the layer "
                "in `skip`, or use format: int8"
            )
        return super().columns_per_group(columns)

    def check(self, rows: int, columns: int) -> None:
        """StartError for a layer `[rows, columns]` that bitsandbytes does not compute on every processor."""
        self.columns_per_group(columns)
        if self.bits == 4 and rows % ROWS:
            raise StartError(
                f"{self.code} needs a multiple of {ROWS} rows, and the layer has {rows}: name it in `skip`, or use "
                "format: int8"
            )


def load_bitsandbytes() -> Any:
    """The package, quiet. StartError where it is not installed."""
    if find_spec("bitsandbytes") is None:
        raise StartError(f"bnb: {MISSING}")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes


def bnb_tensors(in_features: int, out_features: int, spec: BnbSpec) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name -> (dtype, shape) of the tensors that hold a weight [out, in]."""
    if spec.code == "int8":
        return {
            "weight": (torch.int8, (out_features, in_features)),
            "SCB": (torch.float32, (out_features,)),
            "weight_format": (torch.uint8, ()),
        }
    blocks = out_features * in_features // BLOCK
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weight": (torch.uint8, (out_features * in_features // 2, 1)),
        "weight.absmax": (torch.uint8 if spec.double else torch.float32, (blocks,)),
        "weight.quant_map": (torch.float32, (16,)),
        f"weight.quant_state.bitsandbytes__{spec.code}": (torch.uint8, (STATE_BYTES,)),
    }
    if spec.double:
        tensors["weight.nested_absmax"] = (torch.float32, (-(-blocks // NESTED_BLOCK),))
        tensors["weight.nested_quant_map"] = (torch.float32, (NESTED_BLOCK,))
    return tensors


def quantize_int8(weight: Tensor) -> dict[str, Tensor]:
    """LLM.int8's rows: `weight` [out, in] is near `codes * SCB / 127`, `SCB` the largest of each row.

    CompressError where the weight does not fit float16, in which bitsandbytes takes it.
    """
    bnb = load_bitsandbytes()
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
    scales = torch.empty(rows, dtype=torch.float32, device=weight.device)
    for part in row_chunks(rows, columns):
        half = weight[part].contiguous().to(torch.float16)
        if not bool(half.isfinite().all()):
            raise CompressError("a weight is not finite in float16, in which bitsandbytes takes weights for int8")
        codes[part], scales[part], _ = bnb.functional.int8_vectorwise_quant(half)
    return {"weight": codes, "SCB": scales, "weight_format": torch.zeros((), dtype=torch.uint8, device=weight.device)}


def quantize_4bit(weight: Tensor, spec: BnbSpec) -> dict[str, Tensor]:
    """`weight` [out, in] as 4-bit codes of `spec.code`, in blocks of 64 neighbours; the tensors of `bnb_tensors`."""
    functional = load_bitsandbytes().functional
    codes, scales = [], []
    for part in row_chunks(*weight.shape):  # blocks do not reach over rows: a few rows at a time give the same
        found, state = functional.quantize_4bit(weight[part].contiguous(), blocksize=BLOCK, quant_type=spec.code)
        codes.append(found)
        scales.append(state.absmax)
    state.absmax, state.shape = torch.cat(scales), weight.shape
    if spec.double:
        offset = state.absmax.mean()
        state.absmax, nested = functional.quantize_blockwise(state.absmax - offset, blocksize=NESTED_BLOCK)
        state.offset, state.state2, state.nested = offset, nested, True
    tensors = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    name = f"weight.quant_state.bitsandbytes__{spec.code}"
    spaces = torch.full((STATE_BYTES - len(tensors[name]),), ord(" "), dtype=torch.uint8, device=weight.device)
    tensors[name] = torch.cat([tensors[name], spaces])
    return {"weight": torch.cat(codes), **tensors}


class BnbLinear(QuantLinear):
    """y = x W^T + b with W [out, in] as bitsandbytes holds it. `transposed`, `dtype`: as of `QuantLinear`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: BnbSpec,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        transposed: bool = False,
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.spec: BnbSpec = spec
        self.dtype, self.transposed = dtype, transposed
        for name, (kind, shape) in bnb_tensors(in_features, out_features, spec).items():
            self.register_buffer(_attribute(name), torch.empty(shape, dtype=kind, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), False) if bias else None
        self._cache, self._caching = None, False

    @classmethod
    def from_weight(
        cls, weight: Tensor, spec: BnbSpec, bias: Tensor | None = None, transposed: bool = False
    ) -> BnbLinear:
        """Round `weight` [out, in], of the model's dtype. The bias is kept by reference."""
        spec.check(*weight.shape)
        layer = cls(weight.shape[1], weight.shape[0], spec, False, weight.dtype, "meta", transposed)
        tensors = quantize_int8(weight) if spec.code == "int8" else quantize_4bit(weight, spec)
        for name, tensor in tensors.items():
            setattr(layer, _attribute(name), tensor)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    def stored(self) -> dict[str, Tensor]:
        """The tensors that hold the weight, by the names of the file."""
        names = bnb_tensors(self.in_features, self.out_features, self.spec)
        return {name: getattr(self, _attribute(name)) for name in names}

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out, in] in `dtype` (default: the layer's)."""
        functional, stored = load_bitsandbytes().functional, self.stored()
        if self.spec.code == "int8":
            weight = functional.int8_vectorwise_dequant(stored["weight"], stored["SCB"])
        else:
            weight = functional.dequantize_4bit(stored["weight"], self._state(stored))
        return weight.to(dtype or self.dtype)

    def _state(self, stored: dict[str, Tensor]) -> Any:
        statistics = {name: tensor.clone() for name, tensor in stored.items() if name != "weight"}
        return load_bitsandbytes().functional.QuantState.from_dict(statistics, stored["weight"].device)

    def compute(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], by bitsandbytes' own layer on a copy of what is stored."""
        layers, stored = load_bitsandbytes().nn, self.stored()
        codes = stored["weight"].clone()
        sizes = self.in_features, self.out_features, self.bias is not None
        if self.spec.code == "int8":
            layer = layers.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0, device="meta")
            scales = stored["SCB"].clone()
            layer.weight = layers.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
        else:
            layer = layers.Linear4bit(*sizes, self.dtype, self.spec.double, self.spec.code, device="meta")
            layer.weight = layers.Params4bit(
                codes, requires_grad=False, quant_state=self._state(stored), blocksize=BLOCK, bnb_quantized=True,
                compress_statistics=self.spec.double, quant_type=self.spec.code, module=layer,
            )  # fmt: skip
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        result: Tensor = layer.eval()(x)
        return result

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, tensor in self.stored().items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Takes tensors without copying; each must have the shape and dtype that the grid asks for."""
        wanted = {name: _attribute(name) for name in self.stored()}
        for name, attribute in wanted.items():
            tensor, old = state_dict.get(prefix + name), getattr(self, attribute)
            if tensor is None:
                missing_keys.append(prefix + name)
            elif (tensor.dtype, tensor.shape) != (old.dtype, old.shape):
                error_msgs.append(f"{prefix}{name} is {tensor.dtype} {tuple(tensor.shape)}, not {tuple(old.shape)}")
            else:
                setattr(self, attribute, tensor)
        if self.bias is not None and f"{prefix}bias" in state_dict:
            self.bias = nn.Parameter(state_dict[f"{prefix}bias"], requires_grad=False)
        elif self.bias is not None:
            missing_keys.append(f"{prefix}bias")
        known = {*wanted, "bias"} if self.bias is not None else set(wanted)
        unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key[len(prefix) :] not in known]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BnbLinear:
        nn.Module._apply(self, fn, recurse)
        return self


def _attribute(name: str) -> str:
    """A buffer's name for the name of a stored tensor: modules take none with a dot."""
    return "stored_" + name.replace(".", "_")
