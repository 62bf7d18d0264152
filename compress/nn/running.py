"""How a loaded model computes: what `runtime:` of a recipe and the arguments of `compress.load` say."""

from __future__ import annotations

import logging

from torch import nn
from transformers import PreTrainedModel

from compress.errors import StartError
from compress.nn import cpu, prepacked, torch_int4
from compress.nn.quant_linear import QuantLinear
from compress.recipe.sections import Runtime

log = logging.getLogger("compress")


def run_as(model: PreTrainedModel, runtime: Runtime, *, asked: bool) -> None:
    """Sets the layers of a loaded model to compute so. Where the machine cannot: `StartError` if somebody `asked` for
    it just now, and a warning if the model's folder only records it."""
    packed = [module for module in model.modules() if isinstance(module, QuantLinear) and not module.exact]
    if runtime.activations == "int8" and packed and _possible("activations: int8", cpu.why_not_int8(), asked):
        for layer in packed:
            layer.int8_inputs = True
    if runtime.prepack and _possible("prepack", prepacked.why_not(), asked):
        prepacked.prepack(model)


def _possible(what: str, reason: str | None, asked: bool) -> bool:
    if reason is None:
        return True
    if asked:
        raise StartError(f"{what} cannot be had here: {reason}. Leave it out, and the model runs without it.")
    log.warning("The model's folder asks for %s, and runs without it: %s.", what, reason)
    return False


def served(module: nn.Module) -> str | None:
    """What would compute a layer, in a word or two; None for a module that is no linear layer."""
    if isinstance(module, QuantLinear):
        if module.spec.activations:
            return "int8 products" if module.spec.stored == "int8" else "torch"
        reason = cpu.why_not(module)
        if reason is not None and torch_int4.why_not(module) is None:
            return f"torch's 4-bit product, for bfloat16 inputs (not the CPU kernel: {reason})"
        if reason is not None:
            return f"torch, dequantized at each call (not the CPU kernel: {reason})"
        if not module.int8_inputs:
            return "CPU kernel, float activations"
        reason = cpu.why_not_int8(module)
        return "CPU kernel, int8 activations" if reason is None else f"CPU kernel, float activations ({reason})"
    if isinstance(module, prepacked.PrepackedLinear):
        return "oneDNN, prepacked"
    return "torch" if isinstance(module, nn.Linear) else None
