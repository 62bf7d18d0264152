"""The typed content of `report.json`, and how it reaches the disk.

There is no NaN and no Infinity in it: what could not be measured is `{"value": null, "reason": "..."}`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_serializer, model_validator

from compress.errors import CompressError, StartError

SCHEMA_VERSION = 1
Verdict = Literal["better", "worse", "no_difference", "not_tested"]


class Figure(BaseModel):
    """One measured number. `value` None means it could not be measured, and `reason` says why.

    `stderr` is the standard error of `value` (None: exact, or not known), `n` how many items, windows or rounds it
    rests on, `runtime` what the model ran in. `detail` holds what else is worth knowing, such as the spread.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    value: int | float | None
    unit: str = ""
    higher_is_better: bool | None = None
    stderr: float | None = None
    n: int | None = None
    runtime: str | None = None
    reason: str | None = None
    detail: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _finite(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = {**data, "value": _plain(data.get("value")), "stderr": _plain(data.get("stderr"))}
        if isinstance(data["value"], float) and not math.isfinite(data["value"]):
            data = {**data, "value": None, "reason": f"the result is not a finite number ({data['value']})"}
        if data["value"] is None:
            data = {**data, "reason": data.get("reason") or "not measured", "stderr": None}
        if data["stderr"] is not None and not math.isfinite(data["stderr"]):
            data["stderr"] = None
        return data

    @model_serializer
    def _serialize(self) -> dict[str, Any]:
        if self.value is None:
            return {"value": None, "reason": self.reason}
        keys = ("value", "unit", "higher_is_better", "stderr", "n", "runtime")
        entry = {key: getattr(self, key) for key in keys}
        return {**entry, "detail": self.detail} if self.detail else entry


class Comparison(BaseModel):
    """Compressed against original: `delta` = compressed - original with its 95 % interval, and what it means.

    `p_value`: of McNemar's exact test, or of the permutation test that generalises it, where items were compared;
    `p_adjusted`: adjusted by Holm's procedure where it is one of several tasks, and then what the verdict follows. Both
    are left out of the file where they are None.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    delta: float | None = None
    ratio: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    verdict: Verdict = "not_tested"
    sentence: str = ""
    p_value: float | None = None
    p_adjusted: float | None = None

    @model_serializer
    def _serialize(self) -> dict[str, Any]:
        keys = ("delta", "ratio", "ci_low", "ci_high", "verdict", "sentence")
        tested = {key: getattr(self, key) for key in ("p_value", "p_adjusted") if getattr(self, key) is not None}
        return {key: getattr(self, key) for key in keys} | tested


class Flip(BaseModel):
    """An item that one model has right and the other wrong. `text` may be cut."""

    area: str
    change: Literal["right_to_wrong", "wrong_to_right"]
    text: str
    answer: str = ""


class Flips(BaseModel):
    """How many items changed sides, in all and by area, and the texts of some of them. `areas`: area -> the counts
    `right_to_wrong`, `wrong_to_right` and `items`."""

    right_to_wrong: int
    wrong_to_right: int
    items: int
    areas: dict[str, dict[str, int]] = Field(default_factory=dict)
    examples: list[Flip] = Field(default_factory=list)


class WorstText(BaseModel):
    """A window of the evaluation text on which the models differ most: its mean KL divergence per token in nats, and
    the token with the largest one, with the text before it. Texts may be cut."""

    window: int
    kl: float
    text: str
    token: str = ""
    token_kl: float | None = None
    before: str = ""


class GoalResult(BaseModel):
    """A goal of the recipe, whether it is met, and the compressed model's value."""

    metric: str
    goal: str | int | float
    met: bool
    value: int | float | None = None
    reason: str | None = None

    @model_serializer
    def _serialize(self) -> dict[str, Any]:
        entry = {"metric": self.metric, "goal": self.goal, "met": self.met, "value": self.value}
        return {**entry, "reason": self.reason} if self.reason else entry


class Stage(BaseModel):
    """One pass of the run. `predicted` and the measured fields use the same words: `peak_memory_bytes` (resident
    memory above a bare import), `seconds`, `weights_bytes` (the size of what the pass leaves)."""

    model_config = ConfigDict(populate_by_name=True, extra="allow")

    pass_: str = Field(alias="pass")
    options: dict[str, Any] = Field(default_factory=dict)
    seconds: float | None = None
    predicted: dict[str, Any] = Field(default_factory=dict)
    peak_memory_bytes: int | None = None
    coverage: float | None = None
    blocks: list[dict[str, Any]] = Field(default_factory=list)
    measurements: dict[str, Any] = Field(default_factory=dict)
    #: What `compress.measure.damage.measure_damage` gives; None where it was not asked for.
    damage: dict[str, Any] | None = None


class Verified(BaseModel):
    """The exported folder, loaded in a fresh process, against the model in memory (largest difference of logits)."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    reloaded: bool
    by: str | None = "transformers"
    max_logit_difference: float | None = None


class Export(BaseModel):
    """A folder in `exports/`, loaded by its own engine in a fresh process, against the model in memory.

    `bytes`: of all its files. `kl_divergence` (nats a token, in memory || export) and `mean_logprob_difference` (of the
    text's next tokens, nats, without sign) are on the probe text; `allowed`: the most that the latter may be, and its
    square the former.
    `exact_difference`: the larger of the two where the engine rounds nothing but the weights, at most
    `allowed_exactly`; null where it has no such arithmetic.
    `same_tokens`: whether the engine cuts texts into the same ids; null where it has no tokenizer.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: str
    path: str
    bytes: int
    by: str
    reloaded: bool = False
    allowed: float
    kl_divergence: float | None = None
    mean_logprob_difference: float | None = None
    allowed_exactly: float = 1e-3
    exact_difference: float | None = None
    same_tokens: bool | None = None


class Other(BaseModel):
    """A further model of `compress benchmark`, compared with the original."""

    model: str
    measurements: dict[str, Figure]
    comparison: dict[str, Comparison]
    flips: Flips | None = None
    worst: list[WorstText] = Field(default_factory=list)


class Report(BaseModel):
    """All that a run found, with provenance. The fields are those of `report.json`, in its order."""

    model_config = ConfigDict(extra="ignore")

    schema_version: int = SCHEMA_VERSION
    name: str = "compress"
    recipe: dict[str, Any] = Field(default_factory=dict)
    digest: str = ""
    environment: dict[str, Any] = Field(default_factory=dict)
    original: dict[str, Figure] = Field(default_factory=dict)
    stages: list[Stage] = Field(default_factory=list)
    compressed: dict[str, Figure] = Field(default_factory=dict)
    comparison: dict[str, Comparison] = Field(default_factory=dict)
    goals: list[GoalResult] = Field(default_factory=list)
    verified: Verified | None = None
    exports: list[Export] = Field(default_factory=list)
    others: list[Other] = Field(default_factory=list)
    flips: Flips | None = None
    worst: list[WorstText] = Field(default_factory=list)
    generations: list[dict[str, str]] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)

    @property
    def goals_met(self) -> bool:
        return all(goal.met for goal in self.goals)

    def to_json(self) -> str:
        """Strict JSON (no NaN, no Infinity), two spaces of indent, fields in the order of the contract."""
        data = self.model_dump(by_alias=True)
        for key in ("others", "flips", "worst", "generations", "notes"):
            if not data[key]:
                del data[key]
        for stage in data["stages"]:
            if stage["damage"] is None:
                del stage["damage"]
        return json.dumps(finite(data), indent=2, allow_nan=False, ensure_ascii=False) + "\n"

    def write(self, folder: Path | str) -> Path:
        """Writes `report.html`, `report.md` and, last, `report.json` (its presence means the run is over)."""
        from compress.checkpoint import atomic_write_text
        from compress.reports.html import page
        from compress.reports.markdown import markdown

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        report = Report.model_validate_json(self.to_json())
        atomic_write_text(folder / "report.html", page(report))
        atomic_write_text(folder / "report.md", markdown(report))
        atomic_write_text(folder / "report.json", self.to_json())
        return folder / "report.json"

    @classmethod
    def read(cls, folder: Path | str) -> Report:
        """The report in a run's folder (or `report.json` itself)."""
        path = Path(folder)
        if path.is_dir():
            path = path / "report.json"
        if not path.is_file():
            raise StartError(f"{path} does not exist: give the folder of a finished run.")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            version = data.get("schema_version")
            if version != SCHEMA_VERSION:
                raise StartError(f"{path} has schema_version {version}; this version reads {SCHEMA_VERSION}.")
            return cls.model_validate(data)
        except (ValueError, AttributeError, ValidationError) as error:
            raise CompressError(f"{path} is not a report: {str(error).splitlines()[0]}") from error


def _plain(value: Any) -> Any:
    """A numpy or torch scalar as Python's own number."""
    return value.item() if hasattr(value, "item") else value


def finite(data: Any) -> Any:
    """`data` as strict JSON can hold it: numbers that are not finite become `{"value": null, "reason": ...}`."""
    data = _plain(data)
    if isinstance(data, dict):
        return {str(key): finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple, set, frozenset)):
        return [finite(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return {"value": None, "reason": f"not a finite number ({data})"}
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    return str(data)
