"""The parts of a recipe: the texts, what is measured, how the result is run. Importing this module imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from compress.recipe.goals import Goal, parse_goal

Role = Literal["calibration", "evaluation", "training"]
ROLES: tuple[Role, ...] = ("calibration", "evaluation", "training")


class Section(BaseModel):
    """Frozen, and strict about what it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, validate_default=True
    )


class DataEntry(Section):
    """Where a text comes from and how it is cut into token windows. A bare string is its `source`."""

    source: str = Field(min_length=1)
    """`builtin:<name>`, a local .txt or .jsonl file, a Hugging Face dataset id; for calibration, a folder of images."""
    samples: int | None = Field(None, ge=1)
    """How many windows (with `pack: false`: documents). Calibration: 128; evaluation: all (builtin text: 64)."""
    length: int | None = Field(None, ge=2)
    """Tokens in a window. Default: 256, or the model's context where that is shorter."""
    separator: Literal["bos", "none"] = "bos"
    """What stands before each document: the token that begins a text, or nothing."""
    sampling: Literal["random", "sequential"] | None = None
    """Windows at random places, or one after the other from the start. Calibration: random; otherwise sequential."""
    pack: bool | None = None
    """Cut windows from all documents in one stream; false: each document alone, cut at `length`. Default: true; of
    training text, where items have an answer (completion, messages, label), false."""
    seed: int | None = Field(None, ge=0, le=2**32 - 1)
    """Draws the random windows and generates builtin text. Default: the recipe's seed."""
    skip_bad: bool = False
    """Leave out malformed lines, and count them, instead of refusing the file."""

    def resolved(self, role: Role, seed: int) -> DataEntry:
        """The entry with the defaults of its role filled in; `length` stays, since it depends on the model."""
        built_in = {"calibration": 128, "evaluation": 64, "training": 1024}
        samples = built_in[role] if role == "calibration" or self.source.startswith("builtin:") else None
        return self.model_copy(
            update={
                "samples": samples if self.samples is None else self.samples,
                "sampling": self.sampling or ("random" if role == "calibration" else "sequential"),
                "seed": seed if self.seed is None else self.seed,
                "pack": True if self.pack is None and role != "training" else self.pack,
            }
        )


class Data(Section):
    """The texts of a recipe."""

    calibration: DataEntry | None = None
    """What passes look at while they compress."""
    evaluation: DataEntry | None = None
    """What the benchmark measures on; never used to compress."""
    training: DataEntry | None = None
    """What training passes train on; `calibration`, with a warning, where it is absent."""


class Benchmark(Section):
    """What is measured on the original and the compressed model."""

    metrics: tuple[str, ...] | None = None
    """Names of metrics; all cheap ones where absent."""
    tasks: tuple[str, ...] = ()
    """Files of test items (.jsonl), `builtin:<name>`; with the extra `harness` also names of tasks, groups and tags of
    lm-evaluation-harness, and files of tasks in its format (.yaml)."""
    limit: int | None = Field(default=None, ge=1)
    """Most items of each task or area, the first ones; all where absent."""
    goals: dict[str, str | int | float] = Field(default_factory=dict)
    """Metric -> what it must reach: a change (`+2%`, `-1pt`) or a figure (`2GB`). Missing one ends in exit code 3."""
    runtimes: tuple[str, ...] = ("transformers",)
    """What runs the exported model: `transformers`, and any others, which open `exports/<format>`. All are timed in
    turn; figures of others are named as in `decode_tokens_per_second/llama.cpp`."""
    batches: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = (1,)
    """Batch sizes to time, as in [1, 4, 16] (what `compress benchmark` does unless told otherwise). Those above 1 add
    figures as `decode_tokens_per_second/batch 4`; their rows are shorter, so that about as many tokens are read."""
    prompt_tokens: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Further prompt lengths to time, each with every batch, as `first_token_seconds/prompt 2048`; `compress benchmark`
    takes [128, 1024]. What a context or the memory does not hold is left out, and the report says so."""
    setting_seconds: Annotated[float, Field(gt=0)] | None = None
    """Seconds that each of these further batches and prompts may take, with all its rounds and runtimes: it gets fewer
    rounds where that is not enough, and is left out where not even one fits. Absent: no limit; `compress benchmark`
    sets 120."""
    new_tokens: Annotated[int, Field(ge=2)] = 64
    """Tokens that are generated to time decoding."""
    rounds: Annotated[int, Field(ge=1)] = 7
    """How often each speed is taken; the figure is the median. With fewer than 6, differences are not tested."""
    warmup: Annotated[int, Field(ge=0)] = 1
    """Rounds before those that count."""
    watts: Annotated[float, Field(gt=0)] | None = None
    """Watts of one busy CPU core. Where the machine has no energy counter, energy is then estimated from CPU seconds,
    and marked as estimated."""
    prompts: tuple[str, ...] = ()
    """Texts to continue with both models; the report shows them side by side."""
    damage: bool | None = None
    """After each pass, what it did to each block and layer: blocks / 2 + 2 forwards of 1024 tokens. Absent: for models
    up to 500 MB of weights."""
    stages: bool | None = None
    """After each pass but the last, perplexity on the evaluation text (one more reading of it a pass) and size. Absent:
    for models up to 500 MB of weights."""

    def variants(self) -> set[str]:
        """What stands behind the names of speeds and memory: `llama.cpp`, `batch 4`, `prompt 2048`."""
        found = {name for name in self.runtimes if name != "transformers"}
        found |= {f"batch {batch}" for batch in self.batches if batch > 1}
        return found | {f"prompt {length}" for length in self.prompt_tokens}

    def parsed_goals(self) -> list[Goal]:
        return [parse_goal(metric, value) for metric, value in self.goals.items()]


class Runtime(Section):
    """How the compressed model is run. Stored with it: `compress.load` does so unless told otherwise."""

    activations: Literal["float", "int8"] = "float"
    """What packed weights are multiplied with on the CPU, for few tokens at a time. int8: inputs are rounded, a step
    for each group; floats serve where the processor has no AVX-512 VNNI."""
    prepack: bool = False
    """Plain bfloat16 layers are kept in the order that oneDNN multiplies fastest in, on the CPU."""
