"""Where a model's blocks are: found by structure, not by name."""

from __future__ import annotations

from torch import nn

from compress.nn.quant_linear import QuantLinear


class Stack:
    """A list of blocks (`model.layers`), called one after the other."""

    def __init__(self, name: str, modules: nn.ModuleList):
        self.name, self.modules = name, modules

    def __len__(self) -> int:
        return len(self.modules)


def find_stacks(model: nn.Module) -> list[Stack]:
    """The model's stacks of blocks: outermost module lists whose members are made of several layers each."""
    stacks: list[Stack] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(stack.name + ".") for stack in stacks)
        if isinstance(module, nn.ModuleList) and not inside and len(module) and _are_blocks(module):
            stacks.append(Stack(name, module))
    return stacks


def _are_blocks(modules: nn.ModuleList) -> bool:
    return all(_parts(child) > 1 and _has_matrices(child) for child in modules)


def _parts(module: nn.Module) -> int:
    """How many modules it is made of; one that holds nothing but a list of them (T5's block) is what the list is."""
    children = list(module.children())
    return _parts(children[0]) if len(children) == 1 else len(children)


def _has_matrices(module: nn.Module) -> bool:
    return any(p.dim() >= 2 for p in module.parameters()) or any(isinstance(m, QuantLinear) for m in module.modules())
