"""Width pruning: channels of the MLPs and groups of attention heads are taken out, and what read them is fitted anew.

Importance as in Muralidharan and others: "Compact Language Models via Pruning and Knowledge Distillation" (Minitron),
2024, arXiv 2407.14679, section 2.2 (`activation`: the norm over tokens of what a channel gives); as in Molchanov and
others: "Importance Estimation for Neural Network Pruning", 2019, arXiv 1906.10771, section 3.1 (`taylor`: the squared
first-order change of the loss); or by what is lost after the fit (`reconstruction`, `maths/elimination.py`).

The layer that read what is gone is solved for again, by least squares on the calibration text: with it, the sum that it
adds to shall be what it is in the model before this pass, so that what earlier blocks lost is made up for as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.errors import CompressError, StartError
from compress.passes.base import Context, PassResult
from compress.passes.structural import StructuralPass
from compress.sizes import Count, Share, Size, counted, one_way

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from compress.model import Block, ModelHandle
    from compress.stream import CalibrationStream
    from compress.units import Places, Units

#: How many parts of each kind stay.
Mix = tuple[int, ...]


class Width(StructuralPass):
    """Remove channels of the MLPs and groups of attention heads, the same number in every block, and fit anew the
    layers that read them."""

    name: ClassVar[str] = "width"
    needs_calibration: ClassVar[bool] = True

    amount: Share | None = Field(
        default=None,
        description="Share of the blocks' parameters to remove, 30% or 0.3: channels and heads, in the mix that loses "
        "least.",
    )
    to: Size | None = Field(
        default=None, description="Instead: parameters that the whole model shall have at most, as in 90M."
    )
    intermediate_size: Count | None = Field(
        default=None, description="Instead: channels of each MLP that shall remain, a number or a percentage."
    )
    heads: Count | None = Field(
        default=None,
        description="Instead, or with `intermediate_size`: query heads of each block that shall remain, a number or a "
        "percentage. Heads that share a key and value head go together.",
    )
    multiple: int = Field(default=8, ge=1, description="Channels are rounded to a multiple of this.")
    importance: Literal["reconstruction", "activation", "taylor"] = Field(
        default="reconstruction",
        description="What stays: what costs most to do without after the fit; what gives most (the norm over tokens); "
        "or what changes the loss most, by its gradient.",
    )
    refit: bool = Field(default=True, description="Fit anew the layers that read what is removed, by least squares.")
    damping: float = Field(
        default=0.01,
        gt=0,
        le=1,
        description="Share of the mean squared input that holds the fit near the old weights; rises tenfold, up to 1, "
        "if that is too little.",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_way(cls, options: Any) -> Any:
        return one_way(options)

    def refuses(self, model: PreTrainedModel) -> str | None:
        """Where the parts it shall remove cannot be told apart in this kind of model."""
        try:
            self._units(model)
        except StartError as error:
            return str(error)
        return None

    def _units(self, model: PreTrainedModel) -> list[Units]:
        """The kinds of parts that are removed, heads first: the order in which a block computes them."""
        from compress.units import find_channels, find_groups

        if self.amount is None and self.to is None:
            named = [(self.heads, find_groups), (self.intermediate_size, find_channels)]
            return [find(model) for size, find in named if size is not None]
        channels = find_channels(model)
        try:
            return [find_groups(model), channels]
        except StartError:
            return [channels]

    def smaller_config(self, model: PreTrainedModel) -> PretrainedConfig:
        """Where the mix of channels and heads is measured, that with most parameters."""
        units = self._units(model)
        return self._config(model, units, self._mixes(model, units)[-1])

    def _config(self, model: PreTrainedModel, units: Sequence[Units], mix: Mix) -> PretrainedConfig:
        config = model.config
        for kind, count in zip(units, mix, strict=True):
            config = kind.config(config, count)
        return config

    def _mixes(self, model: PreTrainedModel, units: Sequence[Units]) -> list[Mix]:
        """What may stay, so that the target is met, fewest parameters first. StartError where nothing can."""
        if self.amount is None and self.to is None:
            asked = {"heads": self.heads, "intermediate_size": self.intermediate_size}
            mix = tuple(self._asked(model, kind, asked[kind.what]) for kind in units)
            if mix == tuple(kind.count for kind in units):
                raise StartError("width: as much shall remain as there is, so nothing would be removed.")
            return [mix]
        return self._mixes_for(model, units, self._to_remove(model))

    def _asked(self, model: PreTrainedModel, kind: Units, size: int | str | None) -> int:
        """The number of parts that stay for a figure of the recipe."""
        from compress.units import allowed

        assert size is not None
        per, whole = kind.size(1), kind.size(kind.count)
        if isinstance(size, int) and size > whole:
            raise StartError(f"width: {kind.what}: {size} shall remain, and the model has {whole}.")
        possible = allowed(model, kind)
        if isinstance(size, str) and per == 1 and kind.what != "heads":
            return min(kind.count, max(1, round(counted(size, whole) / self.multiple)) * self.multiple)
        if isinstance(size, str):
            return min(possible, key=lambda n: (abs(n * per - counted(size, whole)), n))
        if size % per or size // per not in possible:
            sizes = ", ".join(str(n * per) for n in possible)
            why = f"each key and value head goes with the {per} query heads that share it" if per > 1 else (
                "transformers does not take every number of heads beside this hidden size"
            )
            raise StartError(f"width: heads: {size} cannot remain, since {why}; allowed: {sizes}.")
        return size // per

    def _to_remove(self, model: PreTrainedModel) -> float:
        """Parameters to remove."""
        from compress.reshaping import parameters_of

        inside, whole = _blocks_parameters(model), parameters_of(model)
        if self.amount is not None:
            return self.amount * inside
        assert isinstance(self.to, int)
        if self.to >= whole:
            raise StartError(f"width: to: {self.to:,} parameters shall remain, and the model has {whole:,}.")
        if self.to <= whole - inside:
            raise StartError(
                f"width: to: {self.to:,} parameters cannot be reached: embeddings and head, which are not removed, "
                f"have {whole - inside:,}."
            )
        return whole - self.to

    def _mixes_for(self, model: PreTrainedModel, units: Sequence[Units], remove: float) -> list[Mix]:
        from compress.units import allowed

        *groups, channels = units
        per_channel = _parameters_per_part(model, channels)
        per_group = _parameters_per_part(model, groups[0]) if groups else 0
        found = []
        for kept in allowed(model, groups[0]) if groups else [0]:
            rest = remove - (groups[0].count - kept) * per_group if groups else remove
            count = channels.count if rest <= 0 else int((channels.count - rest / per_channel) // self.multiple)
            count = count if rest <= 0 else count * self.multiple
            if count >= 1:
                found.append((kept, count) if groups else (count,))
        if not found:
            most = (channels.count - self.multiple) * per_channel + (groups[0].count - 1) * per_group if groups else (
                channels.count - self.multiple) * per_channel
            raise StartError(
                f"width: that much cannot be removed: {self.multiple} channels and a group of heads stay in every "
                f"block, so at most {max(0, most) / _blocks_parameters(model):.0%} of the blocks' parameters can go."
            )
        left = {mix: sum(n * p for n, p in zip(mix, [per_group, per_channel][-len(mix):], strict=True)) for mix in found}
        return sorted(found, key=lambda mix: (left[mix], mix))

    def run(self, model: ModelHandle, context: Context) -> PassResult:
        from compress.narrowing import Narrowing
        from compress.reshaping import parameters_of

        if context.calibration is None:
            raise CompressError("width needs calibration text")
        units = self._units(model.model)
        mixes = self._mixes(model.model, units)
        before = parameters_of(model.model)
        work = Narrowing(self, model, context, units)
        found = work.measured(mixes)
        best = min(range(len(mixes)), key=lambda index: (found["losses"][index], index))
        mix = mixes[best]
        config = self._config(model.model, units, mix)
        records, coverage = work.cut(config, mix, found["orders"])
        sizes = {kind.what: kind.size(count) for kind, count in zip(units, mix, strict=True)}
        said = {"parameters_before": before, "parameters": parameters_of(model.model), **sizes}
        return PassResult(model, records, coverage, said)


def _blocks_parameters(model: PreTrainedModel) -> int:
    from compress.model import find_stacks

    return sum(p.numel() for stack in find_stacks(model) for p in stack.modules.parameters())


def _parameters_per_part(model: PreTrainedModel, kind: Units) -> float:
    """Parameters that go with one part, over all blocks."""
    from compress.reshaping import empty_model
    from compress.units import fewer

    count = fewer(model, kind)
    less = _blocks_parameters(model) - _blocks_parameters(empty_model(model, kind.config(model.config, count)))
    return less / (kind.count - count)
