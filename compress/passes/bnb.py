"""bnb: bitsandbytes' layers, NF4 and FP4 with double quantization, and LLM.int8.

Dettmers, Pagnoni, Holtzman, Zettlemoyer: "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, arXiv 2305.14314,
section 3: the sixteen codes of NF4 are spread so that weights drawn from a normal distribution fall on each as often.
Dettmers, Lewis, Belkada, Zettlemoyer: "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", 2022, arXiv
2208.07339. Rounding and arithmetic are bitsandbytes' own (`compress.nn.bnb_linear`).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.maths.grid import CHUNK_ELEMENTS
from compress.nn.bnb_linear import MISSING, BnbLinear, BnbSpec
from compress.passes.base import BlockPass, LayerShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.calibration import BlockCalibration
    from compress.model import Block

#: Resident memory that importing bitsandbytes adds (measured: 46 MB with 0.50 on Linux).
IMPORT_BYTES = 48 << 20


class Bnb(BlockPass):
    """Store layers as bitsandbytes does: NF4 or FP4 with double quantization, or LLM.int8; without data."""

    name: ClassVar[str] = "bnb"
    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "sparse"})
    leaves: ClassVar[str] = "quantized"

    format: Literal["nf4", "fp4", "int8"] = Field(
        default="nf4", description="nf4 and fp4: 4 bits in blocks of 64 weights. int8: 8 bits, inputs rounded as well."
    )
    double_quantization: bool = Field(
        default=True, description="Round the scales of 4-bit blocks to 8 bits: 4.13 bits a weight instead of 4.5."
    )

    @property
    def spec(self) -> BnbSpec:
        return BnbSpec.of(self.format, self.double_quantization)

    def refuses(self, model: PreTrainedModel) -> str | None:
        return MISSING if find_spec("bitsandbytes") is None else None

    def spec_of(self, layer: LayerShape) -> BnbSpec:
        self.spec.check(layer.outputs, layer.inputs)
        return self.spec

    def working_bytes(self, layers: Sequence[LayerShape], tokens_per_batch: int) -> int:
        """Two tables of 4 bytes a weight while its error is measured; five for the rows at hand while it is rounded;
        and what importing bitsandbytes takes."""
        largest = max((layer.outputs * layer.inputs for layer in layers), default=0)
        return IMPORT_BYTES + 8 * largest + 20 * CHUNK_ELEMENTS

    def compress_block(self, block: Block, calibration: BlockCalibration | None) -> dict[str, Any]:
        layers: dict[str, Any] = {}
        for name, layer in block.layers(self.targets, self.skip).items():
            weight = layer.weight
            packed = BnbLinear.from_weight(weight, self.spec, layer.module.bias, layer.transposed)
            size = float(weight.float().square().sum())
            lost = float(packed.dequantize().float().sub_(weight).square_().sum())
            layers[name] = {"bits": self.spec.bits, "loss": lost / size if size else 0.0}
            layer.pack(packed)
        return {"layers": layers}
