"""Depth pruning: whole blocks are removed, those that change the hidden states least.

Men, Xu, Zhang and others: "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024, arXiv
2403.03853, section 3: the influence of a block is one minus the cosine between what goes into it and what comes out,
averaged over tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.errors import StartError
from compress.passes.base import Context, PassResult
from compress.passes.structural import StructuralPass, keep_smaller

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from compress.model import Block, ModelHandle


def block_influence(before: Tensor, after: Tensor) -> Tensor:
    """One minus the cosine between rows of `before` and `after` `[..., hidden]`: float32 `[...]`."""
    return 1 - torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)


class Depth(StructuralPass):
    """Remove whole blocks: those whose output is most like their input, or those named."""

    name: ClassVar[str] = "depth"
    needs_calibration: ClassVar[bool] = True
    streams_text: ClassVar[bool] = True

    layers: int | None = Field(default=None, ge=1, description="How many blocks shall remain.")
    drop: list[int] | None = Field(
        default=None, description="Indices of the blocks to remove, counted from 0; no text is needed then."
    )

    @property
    def takes_calibration(self) -> bool:
        return self.drop is None

    def smaller_config(self, model: PreTrainedModel) -> PretrainedConfig:
        from compress.model import find_stacks
        from compress.reshaping import without_blocks

        count = len(find_stacks(model)[0])
        return without_blocks(model.config, self._kept(count, [float(index) for index in range(count)]))

    def _kept(self, count: int, influence: list[float]) -> list[int]:
        if self.drop is not None:
            unknown = [index for index in self.drop if not 0 <= index < count]
            if unknown:
                raise StartError(f"depth: drop names block {unknown[0]}; there are blocks 0 to {count - 1}.")
            return [index for index in range(count) if index not in self.drop]
        assert self.layers is not None
        if self.layers > count:
            raise StartError(f"depth: layers: {self.layers} shall remain, and the model has {count}.")
        strongest = sorted(range(count), key=lambda index: -influence[index])[: self.layers]
        return sorted(strongest)

    def run(self, model: ModelHandle, context: Context) -> PassResult:
        from compress.reshaping import parameters_of, without_blocks

        count = len(model.block_list())
        influence = self._influence(model, context) if self.takes_calibration else [0.0] * count
        keep = self._kept(count, influence)
        before = parameters_of(model.model)
        config = without_blocks(model.config, keep)
        records = keep_smaller(model, context, config, _drawn(model, keep, influence))
        found = {"kept": keep, "influence": influence, "parameters_before": before}
        return PassResult(model, records, 1 - len(keep) / count, found | {"parameters": parameters_of(model.model)})

    def _influence(self, model: ModelHandle, context: Context) -> list[float]:
        def measured() -> dict[str, Any]:
            from compress.stream import CalibrationStream

            assert context.calibration is not None
            stream = CalibrationStream(model, context.calibration, context.tokens_per_batch)
            found = []
            with context.progress.step("depth: influence", total=len(model.block_list())) as step:
                for block in model.blocks():
                    before = list(stream.hidden)
                    stream.advance(block)
                    pairs = zip(before, stream.hidden, strict=True)
                    found.append(float(torch.cat([block_influence(b, a).flatten() for b, a in pairs]).mean()))
                    step.advance(block.name)
            return {"influence": found}

        kept = context.stage.once("influence", measured) if context.stage else measured()
        found: list[float] = kept["influence"]
        return found


def _drawn(model: ModelHandle, keep: list[int], influence: list[float]) -> Iterator[tuple[Block, dict[str, Any]]]:
    blocks = model.block_list()
    for index in keep:
        block = model.load(blocks[index])
        yield block, {"name": block.name, "error": None, "influence": influence[index]}
        model.release(block)
