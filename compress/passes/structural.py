"""What passes that leave a model of another shape have in common: a new config says all of it.

Such a pass decides what stays, makes the smaller model's config, and puts the tensors that are left into a model built
from it (`compress/reshaping.py`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from compress.passes.base import Context, Pass

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

    from compress.model import Block, ModelHandle


class StructuralPass(Pass):
    """A pass that removes parts of the model: it leaves a smaller model of the same architecture."""

    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "sparse"})
    leaves: ClassVar[str] = "dense"
    structural: ClassVar[bool] = True
    changes_outside: ClassVar[bool] = True

    @abstractmethod
    def smaller_config(self, model: PreTrainedModel) -> PretrainedConfig:
        """The config of a model as large as the one that `run` leaves of this one, which may be without weights: which
        parts stay is not known yet. StartError where the options ask for what cannot be."""

    def reshape(self, model: ModelHandle) -> None:
        """Gives a model without weights the shape that `run` leaves."""
        from compress.reshaping import take_shape

        take_shape(model, self.smaller_config(model.model))

    def extra_bytes(self, shape: Any) -> int | None:
        """`shape`: as the pass finds the model. Nothing beside the model, unless the pass says otherwise."""
        return 0


def keep_smaller(
    model: ModelHandle,
    context: Context,
    config: PretrainedConfig,
    blocks: Iterable[tuple[Block, dict[str, Any]]],
    outside: dict[str, Tensor] | None = None,
) -> list[dict[str, Any]]:
    """Makes `model` the smaller one of `config`, and keeps it in the stage; returns the blocks' records.

    `blocks`: for each block of the smaller model, in order, one that holds its tensors and fits its shapes, loaded when
    it is drawn from the iterable and free to go afterwards; and its record. `outside`: tensors outside the blocks that
    are changed, by their name in the smaller model.
    """
    from compress.model import Block, find_stacks
    from compress.reshaping import empty_model, take_shape

    stage = context.stage
    stacks = find_stacks(empty_model(model.model, config))
    places = [Block(stack, index) for stack in stacks for index in range(len(stack))]
    states, records = [], []
    for place, (block, record) in zip(places, blocks, strict=True):
        tensors = block.state()
        if stage is not None:
            place.restore(tensors, {})
            stage.keep(place, record)
        if model.resident:
            states.append(tensors)
        place.module.to("meta")
        records.append(record)
    if stage is not None:
        stage.keep_config(config)
        if outside:
            stage.keep_outside(outside)
    take_shape(model, config, outside)
    for block, tensors in zip(model.block_list(), states, strict=False):
        block.restore(tensors, {})
    return records
