"""What a student is to learn from its teacher: the weighted list of losses as it stands in a recipe.

An entry is a mapping with one key, the loss's name, or the name alone: `losses: [kl, {hidden: {weight: 0.1}}]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_serializer, model_validator

from compress.maths.divergence import Direction

Layers = Literal["auto"] | dict[int, int]


class _Term(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    weight: float = Field(default=1.0, gt=0, description="What the loss is multiplied by in the sum.")


class KL(_Term):
    """The teacher's next-token distribution."""

    direction: Direction = Field(
        default="forward",
        description="forward: KL(teacher || student), covers all that the teacher says; reverse: KL(student || "
        "teacher), keeps to what it says most; jsd: between the two, by `beta`.",
    )
    beta: float = Field(default=0.5, gt=0, lt=1, description="Of jsd: near 0 it is like forward, near 1 like reverse.")
    temperature: float = Field(default=1.0, gt=0, le=100, description="Both distributions are softened by it.")


class Hidden(_Term):
    """The outputs of the teacher's blocks."""

    layers: Layers = Field(
        default="auto",
        description="Student block: teacher block, counted from 0. auto: every block of the student, evenly spread "
        "over those of the teacher.",
    )
    metric: Literal["mse", "cosine"] = Field(
        default="mse", description="Squared difference relative to the teacher's own square, or 1 - cosine."
    )


class Attention(_Term):
    """Where the teacher looks: KL of its attention to the student's, of each head, or of the heads' mean where the two
    have different numbers of heads. Nothing of it is cached: the teacher runs in every step."""

    layers: Layers = Field(
        default="auto", description="Student block: teacher block, counted from 0. auto: the last of both."
    )


class Labels(_Term):
    """The text itself: the next token, or the class where the model classifies."""


class Rationale(_Term):
    """The teacher's reasoning, learnt as a second task beside the answer (Hsieh et al. 2023, Distilling step-by-step,
    arXiv 2305.02301): the student need not write it when it is used."""

    answer_prefix: str = Field(default="", description="Text before a prompt that is to be answered.")
    rationale_prefix: str = Field(default="Explain. ", description="Text before a prompt that is to be reasoned about.")


_KINDS = {"kl": KL, "hidden": Hidden, "attention": Attention, "labels": Labels, "rationale": Rationale}


class Loss(BaseModel):
    """One entry of `losses`: exactly one of the keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kl: KL | None = Field(default=None, description="Next-token distribution of the teacher.")
    hidden: Hidden | None = Field(default=None, description="Outputs of the teacher's blocks.")
    attention: Attention | None = Field(default=None, description="Attention of the teacher's heads.")
    labels: Labels | None = Field(default=None, description="The text itself.")
    rationale: Rationale | None = Field(default=None, description="The teacher's reasoning, as a second task.")

    @model_validator(mode="wrap")
    @classmethod
    def _named(cls, value: Any, build: Callable[[Any], Loss]) -> Loss:
        """A name alone stands for the loss with its defaults, and so does `name: null`."""
        allowed = f"allowed: one of {', '.join(_KINDS)}, as in {{kl: {{weight: 1}}}}"
        if isinstance(value, str):
            if value not in _KINDS:
                raise ValueError(f'"{value}" is no loss; {allowed}')
            value = {value: {}}
        if isinstance(value, dict):
            if len(value) != 1:
                raise ValueError(f"an entry of losses has one key, not {len(value)}; {allowed}")
            value = {name: {} if options is None else options for name, options in value.items()}
        return build(value)

    @property
    def kind(self) -> str:
        """The loss's name."""
        return next(name for name in _KINDS if getattr(self, name) is not None)

    @property
    def term(self) -> KL | Hidden | Attention | Labels | Rationale:
        """Its options."""
        found: KL | Hidden | Attention | Labels | Rationale = getattr(self, self.kind)
        return found

    @model_serializer
    def _one(self) -> dict[str, Any]:
        return {self.kind: self.term.model_dump(mode="json")}


class StudentOptions(BaseModel):
    """Who learns."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    source: str = Field(
        default="model",
        min_length=1,
        description="model: the model as the recipe has it by now. teacher: made of the teacher's weights. fresh: the "
        "model's kind with random weights. Else the folder or hub id of a model, or a config.json for random weights.",
    )
    layers: int | str | list[int] | None = Field(
        default=None,
        description="Blocks that remain: a number or a percentage, those that `depth` keeps (of a model that writes no "
        "text the lowest ones), or a list of their indices, counted from 0.",
    )
    intermediate_size: int | str | None = Field(
        default=None, description="What remains of each MLP, as `width` takes it: a number of channels or a percentage."
    )
    heads: int | str | None = Field(
        default=None, description="Query heads of each block that remain, as `width` takes it."
    )

    @field_validator("layers", "intermediate_size", "heads")
    @classmethod
    def _amount(cls, value: Any) -> Any:
        if isinstance(value, list):
            if not value or min(value) < 0 or len(set(value)) != len(value):
                raise ValueError("a list of blocks has each index once, counted from 0")
            return sorted(value)
        if value is not None:
            amount(value, 100)
        return value


def amount(value: int | str, whole: int) -> int:
    """A number, or a percentage of `whole`, at least 1. ValueError with what is allowed."""
    if isinstance(value, int):
        if value < 1:
            raise ValueError(f"{value} is not allowed; allowed: 1 or more, or a percentage such as 50%")
        return value
    try:
        share = float(value.removesuffix("%")) if value.endswith("%") else -1.0
    except ValueError:
        share = -1.0
    if not 0 < share <= 100:
        raise ValueError(f'"{value}" is not allowed; allowed: a whole number, or a percentage such as 50%')
    return max(1, round(whole * share / 100))
