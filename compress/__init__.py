"""Makes transformers models smaller and faster, and proves what it cost.

    import compress
    report = compress.run("recipe.yaml")              # everything, as the command line does it
    result = compress.GPTQ(bits=4)(model, calibration=texts, tokenizer=tokenizer)
    model = compress.load("runs/recipe")              # runs from packed weights

Names are imported when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.comparing import benchmark as benchmark
    from compress.errors import CompressError as CompressError
    from compress.loading import load as load
    from compress.passes.alps import ALPS as ALPS
    from compress.passes.autoround import AutoRound as AutoRound
    from compress.passes.awq import AWQ as AWQ
    from compress.passes.block_distill import BlockDistill as BlockDistill
    from compress.passes.bnb import Bnb as Bnb
    from compress.passes.depth import Depth as Depth
    from compress.passes.distill import Distill as Distill
    from compress.passes.efficientqat import EfficientQAT as EfficientQAT
    from compress.passes.experts import Experts as Experts
    from compress.passes.fp8 import FP8 as FP8
    from compress.passes.gptq import GPTQ as GPTQ
    from compress.passes.hqq import HQQ as HQQ
    from compress.passes.kv_cache import KVCache as KVCache
    from compress.passes.llm_qat import LLMQAT as LLMQAT
    from compress.passes.lora import LoRA as LoRA
    from compress.passes.magnitude import Magnitude as Magnitude
    from compress.passes.quantize import Quantize as Quantize
    from compress.passes.repair import Repair as Repair
    from compress.passes.rotate import Rotate as Rotate
    from compress.passes.rtn import RTN as RTN
    from compress.passes.smoothquant import SmoothQuant as SmoothQuant
    from compress.passes.sparsegpt import SparseGPT as SparseGPT
    from compress.passes.vocab import Vocab as Vocab
    from compress.passes.wanda import Wanda as Wanda
    from compress.passes.width import Width as Width
    from compress.pipeline import run as run
    from compress.planning import plan as plan
    from compress.recipe import Recipe as Recipe
    from compress.reports.report import Report as Report

__version__ = "0.1.0"

_PUBLIC = {
    "ALPS": "compress.passes.alps",
    "AWQ": "compress.passes.awq",
    "AutoRound": "compress.passes.autoround",
    "BlockDistill": "compress.passes.block_distill",
    "Bnb": "compress.passes.bnb",
    "CompressError": "compress.errors",
    "Depth": "compress.passes.depth",
    "Distill": "compress.passes.distill",
    "EfficientQAT": "compress.passes.efficientqat",
    "Experts": "compress.passes.experts",
    "FP8": "compress.passes.fp8",
    "GPTQ": "compress.passes.gptq",
    "HQQ": "compress.passes.hqq",
    "KVCache": "compress.passes.kv_cache",
    "LLMQAT": "compress.passes.llm_qat",
    "LoRA": "compress.passes.lora",
    "Magnitude": "compress.passes.magnitude",
    "Quantize": "compress.passes.quantize",
    "RTN": "compress.passes.rtn",
    "Recipe": "compress.recipe",
    "Repair": "compress.passes.repair",
    "Report": "compress.reports.report",
    "Rotate": "compress.passes.rotate",
    "SmoothQuant": "compress.passes.smoothquant",
    "SparseGPT": "compress.passes.sparsegpt",
    "Vocab": "compress.passes.vocab",
    "Wanda": "compress.passes.wanda",
    "Width": "compress.passes.width",
    "benchmark": "compress.comparing",
    "load": "compress.loading",
    "plan": "compress.planning",
    "run": "compress.pipeline",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'compress' has no attribute '{name}'")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
