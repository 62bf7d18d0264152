"""A block of four matrices and its calibration, without a model around them, to look at what a pass does to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from compress.maths.grid import QuantSpec, dequantize


class StubLayer:
    def __init__(self, block: StubBlock, name: str):
        self.block, self.name, self.module = block, name, block.modules[name]
        self.dtype = self.module.weight.dtype

    @property
    def weight(self) -> Tensor:
        return self.module.weight.detach()

    def set_weight(self, weight: Tensor) -> None:
        self.weight.copy_(weight)

    def quantize(self, codes: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> None:
        self.block.quantized[self.name] = (codes, scale, zero, spec)
        self.set_weight(dequantize(codes, scale, zero, spec, torch.float32))


class StubBlock:
    """`first` and `twin` share an input of 16; `second` is given what `first` makes of it; `silent` is never called."""

    def __init__(self, sparse: bool = False):
        torch.manual_seed(0)
        self.name, self.sparse = "block", sparse
        names = ("first", "twin", "second", "silent")
        self.modules = {name: nn.Linear(16, 16, bias=False) for name in names}
        self.original = {name: module.weight.detach().clone() for name, module in self.modules.items()}
        self.quantized: dict[str, tuple] = {}

    def layers(self, targets: Sequence[str] | None, skip: Sequence[str]) -> dict[str, StubLayer]:
        return {name: StubLayer(self, name) for name in self.modules}

    def forward(self, x: Tensor) -> None:
        self.modules["twin"](x)
        self.modules["second"](self.modules["first"](x))

    def quantized_weight(self, name: str) -> Tensor:
        return dequantize(*self.quantized[name], torch.float32)

    def random_inputs(self) -> Tensor:
        """[tokens, 16], columns of very different size."""
        return torch.randn(120, 16) @ torch.randn(16, 16) * torch.linspace(0.05, 2, 16).flip(0)


class StubCalibration:
    """Runs the block over its inputs in three batches; `observed` lists the layers that were looked at."""

    def __init__(self, block: StubBlock, inputs: Tensor):
        self.block, self.inputs = block, inputs
        self.silent = ("silent",)
        self.observed: list[str] = []

    def stages(self, names: Sequence[str]) -> list[list[str]]:
        return [["first", "twin"], ["second"]]

    @torch.no_grad()
    def observe(self, observers: Mapping[str, Callable[[Tensor], None]]) -> None:
        self.observed += observers
        hooks = [
            self.block.modules[name].register_forward_pre_hook(lambda _, args, see=see: see(args[0]))
            for name, see in observers.items()
        ]
        for batch in self.inputs.split(50):
            self.block.forward(batch)
        for hook in hooks:
            hook.remove()
