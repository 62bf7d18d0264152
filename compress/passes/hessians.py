"""What passes by second order gather of a block: the Hessian of each input, for the layers that share it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from compress.maths.hessian import CrossMoment, Hessian
from compress.passes.base import LayerShape

if TYPE_CHECKING:
    from compress.calibration import BlockCalibration
    from compress.model import Layer


def hessian_sizes(layers: Sequence[LayerShape]) -> list[int]:
    """Bytes of a block's Hessians, float32. Which layers share an input, shapes do not say: those of one shape are
    taken to, as q, k and v do; where o has it too, that is one too few, and the layers with the most columns outweigh
    it."""
    return list({(layer.inputs, layer.outputs): 4 * layer.inputs**2 for layer in layers}.values())


def hessian_bytes(layers: Sequence[LayerShape], sequential: bool) -> int:
    """Of the Hessians that are held at once."""
    sizes = hessian_sizes(layers)
    return max(sizes, default=0) if sequential else sum(sizes)


def observing_bytes(
    layers: Sequence[LayerShape], tokens_per_batch: int, sequential: bool, original: bool = False
) -> int:
    """The Hessians, and one batch of the layer's input, which is a copy where the model computes in 16 bits; with the
    original path, the same again for the products with the original's inputs, and a batch of these for all layers."""
    copies = max((4 * tokens_per_batch * layer.inputs for layer in layers if layer.dtype.itemsize < 4), default=0)
    held = hessian_bytes(layers, sequential) + copies
    if not original:
        return held
    kept: dict[tuple[int, int], int] = {(it.inputs, it.outputs): it.inputs * it.dtype.itemsize for it in layers}
    return 2 * held + tokens_per_batch * sum(kept.values())


class Inputs:
    """What is gathered of a layer's input: the Hessian, and where asked for the products with the original's inputs."""

    def __init__(self, weight: Tensor, original: bool = False):
        columns = weight.shape[1]
        self.hessian = Hessian(columns, weight.device)
        self.cross = CrossMoment(columns, weight.device) if original else None

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        """Tokens `[tokens, in]`, as they are now and in the original model."""
        self.hessian.add(x)
        if self.cross is not None and original is not None:
            self.cross.add(original, x)

    def deviation(self) -> Tensor | None:
        """Mean of `2 (x - x~) x~^T`, `x~` being the input as it is now; uses up the products."""
        return None if self.cross is None else self.cross.matrix.sub_(self.hessian.matrix)


def observed_stages(
    layers: Mapping[str, Layer], calibration: BlockCalibration, sequential: bool, original: bool = False
) -> Iterator[tuple[dict[str, Layer], Inputs]]:
    """The layers of each input, and what was seen of it: all from one run of the block as it came in; `sequential`: a
    run for each input, when the layers before have been changed.

    A layer that the first batch did not reach stands alone at the end, with a run of its own, and may have seen none.
    """
    stages = calibration.stages(list(layers))
    unseen = [[name] for name in layers if not any(name in stage for stage in stages)]
    runs = [[stage] for stage in stages] if sequential else [stages]
    for run in [*runs, *([stage] for stage in unseen)]:
        inputs = {stage[0]: Inputs(layers[stage[0]].weight, original) for stage in run}
        observe = calibration.observe_pairs if original else calibration.observe
        observe({name: seen.add for name, seen in inputs.items()})
        for stage in run:
            yield {name: layers[name] for name in stage}, inputs.pop(stage[0])
