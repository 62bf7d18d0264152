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

from pydantic import Field, model_validator

from compress.errors import CompressError, StartError
from compress.passes.base import Context, PassResult
from compress.passes.structural import StructuralPass
from compress.sizes import Count, Share, Size, counted, one_way

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from compress.costs import Text
    from compress.model import ModelHandle
    from compress.shapes import ModelShape
    from compress.units import Units

#: How many parts of each kind stay.
Mix = tuple[int, ...]
#: Mixes of heads and channels that are tried.
MIXES = 6


class Width(StructuralPass):
    """Remove channels of MLPs and groups of heads, as many in every block, and fit anew the layers that read them.

    Where the blocks of a stack share one table of position biases (T5), they lose the same heads.
    """

    name: ClassVar[str] = "width"
    needs_calibration: ClassVar[bool] = True
    copies_blocks: ClassVar[bool] = True

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
        "percentage. Heads that share a key and value head go together; with T5's position biases, which the blocks "
        "of a stack share, the same heads go in all of them.",
    )
    hidden_size: Count | None = Field(
        default=None,
        description="Instead: channels of the residual stream that shall remain, a number or a percentage: embedding, "
        "norms, head and all layers get narrower.",
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

    @model_validator(mode="after")
    def _importance_of_channels(self) -> Width:
        if self.hidden_size is not None and self.importance == "taylor":
            raise ValueError("importance: taylor is for channels of MLPs and for heads; hidden_size has activation")
        return self

    @model_validator(mode="before")
    @classmethod
    def _one_way(cls, options: Any) -> Any:
        return one_way(options)

    def refuses(self, model: PreTrainedModel) -> str | None:
        """Where the parts it shall remove cannot be told apart in this kind of model."""
        from compress.model import find_stacks
        from compress.units import find_stream

        kind = type(model).__name__
        try:
            self._units(model)
            if self.hidden_size is not None:
                find_stream(model)
        except StartError as error:
            return str(error)
        if self.hidden_size is not None and model.get_output_embeddings() is None:
            return f"{kind} has no head: its hidden size is what it gives."
        if self.importance == "taylor" and len(find_stacks(model)) > 1:
            return f"importance: taylor takes models with one stack of blocks, and {kind} has an encoder and a decoder."
        if self.importance == "taylor" and model.get_output_embeddings() is None:
            return f"importance: taylor needs a model that predicts tokens, and {kind} has no head."
        return None

    def _units(self, model: PreTrainedModel) -> list[Units]:
        """The kinds of parts that are removed, heads first: the order in which a block computes them."""
        from compress.units import find_channels, find_groups

        if self.hidden_size is not None:
            return []
        if self.amount is None and self.to is None:
            found: list[Units] = [] if self.heads is None else [find_groups(model)]
            return found if self.intermediate_size is None else [*found, find_channels(model)]
        channels = find_channels(model)
        try:
            return [find_groups(model), channels]
        except StartError:
            return [channels]

    def smaller_config(self, model: PreTrainedModel) -> PretrainedConfig:
        """Where the mix of channels and heads is measured, that with most parameters."""
        if self.hidden_size is not None:
            return self._narrow(model)
        units = self._units(model)
        return self._config(model, units, self._mixes(model, units)[-1])

    def _narrow(self, model: PreTrainedModel) -> PretrainedConfig:
        """The config with fewer channels of the stream. A percentage becomes the nearest number that is possible."""
        from compress.units import find_stream, takes

        units = find_stream(model)
        asked = self.hidden_size
        assert asked is not None
        if isinstance(asked, str):
            share = counted(asked, units.count)
            some = [*range(self.multiple, units.count, self.multiple), units.count]
            near = sorted(some, key=lambda n: (abs(n - share), n))
            found = next((n for n in near if takes(model, units, n)), units.count)
        else:
            found = asked
        if found > units.count:
            raise StartError(f"width: hidden_size: {asked} shall remain, and the model has {units.count}.")
        if found == units.count:
            raise StartError("width: as much shall remain as there is, so nothing would be removed.")
        if not takes(model, units, found):
            raise StartError(
                f"width: hidden_size: transformers does not take {found} beside this number of heads; give a multiple "
                "of that, or a percentage."
            )
        return units.config(model.config, found)

    def plan_note(self, model: PreTrainedModel) -> str:
        if self.amount is None and self.to is None:
            return ""
        return "the size is an upper bound: how many channels and how many heads stay is measured"

    def text_bytes(self, shape: ModelShape, text: Text) -> int:
        """The hidden states, those of the original too for the fit, an encoder's also for its decoder; one batch on its
        way, or the tables of the largest reader: Hessians, and what factorising, inverting or solving adds; logits,
        where mixes are compared."""
        from compress.budget import batch_tokens
        from compress.costs import activations
        from compress.narrowing import TRIAL_TOKENS
        from compress.units import Groups

        hidden: int = shape.hidden * shape.dtype.itemsize
        tokens, chosen = text.in_flight(), self.amount is not None or self.to is not None
        taylor = self.importance == "taylor"
        stacks = len(shape.handle.stacks)
        paths = 2 * stacks - 1  # a decoder's own, what its encoder gave, and that behind the encoder's last norm
        kept = text.tokens * ((1 + self.refit) * paths * hidden + 8)
        kept += MIXES * min(TRIAL_TOKENS, text.tokens) * paths * hidden if chosen else 0
        logits = 4 * batch_tokens(text.length, shape.vocabulary) * shape.vocabulary * shape.dtype.itemsize
        running = activations(shape, shape.widest, tokens, text.length) + tokens * hidden
        units = self._units(shape.handle.model)
        columns = [kind.columns for kind in units]
        if stacks > 1:  # a decoder's block has two attentions
            columns += [kind.columns for kind in units if isinstance(kind, Groups)]
        if self.hidden_size is not None:
            first = shape.handle.block_list()[0].layers().values()
            columns = sorted({layer.weight.shape[1] for layer in first})
        hessians = 4 * sum(n**2 for n in columns)
        solving = max(4 * (3 * n**2 + 3 * n * shape.hidden) for n in columns)
        most = hessians + max(running, solving, logits if chosen or taylor else 0)
        if taylor:  # before all else: what enters every block, and the graph of one
            most = max(most, text.tokens * hidden * len(shape.handle.block_list()) + 3 * running)
        return kept + most

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
            rounded = max(1, round(counted(size, whole) / self.multiple)) * self.multiple
            return rounded if rounded < kind.count else kind.count
        if isinstance(size, str):
            share = counted(size, whole)
            return min(possible, key=lambda n: (abs(n * per - share), n))
        if size % per or size // per not in possible:
            sizes = ", ".join(str(n * per) for n in possible)
            why = "transformers does not take every number of heads beside this hidden size"
            if size % per:
                why = f"each key and value head goes with the {per} query heads that share it"
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
        """Each number of groups that may stay, with as many channels as then stay."""
        from compress.units import allowed

        *others, channels = units
        *per_group, per_channel = [_parameters_per_part(model, kind) for kind in units]
        found: dict[Mix, float] = {}
        for kept in _some(allowed(model, others[0])) if others else [0]:
            rest = remove - sum((kind.count - kept) * per for kind, per in zip(others, per_group, strict=True))
            fitting = int((channels.count - rest / per_channel) // self.multiple) * self.multiple
            count = channels.count if rest <= 0 else fitting
            if count >= 1:
                mix = (kept, count) if others else (count,)
                found[mix] = sum(kept * per for per in per_group) + count * per_channel
        if not found:
            most = (channels.count - self.multiple) * per_channel
            most += sum((kind.count - 1) * per for kind, per in zip(others, per_group, strict=True))
            raise StartError(
                f"width: that much cannot be removed: {self.multiple} channels and a group of heads stay in every "
                f"block, so at most {max(0.0, most) / _blocks_parameters(model):.0%} of the blocks' parameters can go."
            )
        return sorted(found, key=lambda mix: (found[mix], mix))

    def run(self, model: ModelHandle, context: Context) -> PassResult:
        from compress.narrowing import Narrowing
        from compress.reshaping import parameters_of

        if context.calibration is None:
            raise CompressError("width needs calibration text")
        before = parameters_of(model.model)
        if self.hidden_size is not None:
            return self._run_narrow(model, context, before)
        units = self._units(model.model)
        mixes = self._mixes(model.model, units)
        work = Narrowing(self, model, context, units)
        found = work.measured(mixes)
        best = min(range(len(mixes)), key=lambda index: (found["costs"][index], index))
        mix = mixes[best]
        config = self._config(model.model, units, mix)
        records, coverage = work.cut(config, mix, found["orders"])
        sizes = {kind.what: kind.size(count) for kind, count in zip(units, mix, strict=True)}
        said: dict[str, Any] = {"parameters_before": before, "parameters": parameters_of(model.model), **sizes}
        if found["by_what_they_give"]:
            said["ranked_by_what_they_give"] = found["by_what_they_give"]
        return PassResult(model, records, coverage, said)

    def _run_narrow(self, model: ModelHandle, context: Context, before: int) -> PassResult:
        from compress.hidden import NarrowStream
        from compress.reshaping import parameters_of

        config = self._narrow(model.model)
        records, coverage = NarrowStream(self, model, context, config).run()
        said = {"parameters_before": before, "parameters": parameters_of(model.model)}
        return PassResult(model, records, coverage, said | {"hidden_size": config.get_text_config().hidden_size})


def _some(counts: list[int]) -> list[int]:
    """At most `MIXES` of them, evenly spread, the largest among them."""
    step = max(1, -(-len(counts) // MIXES))
    return counts[::-1][::step][::-1]


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
