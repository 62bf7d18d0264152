"""Names -> classes: the passes, metrics, formats and runtimes that exist, and what options a pass has.

Each registry is a table of `name: "module:Class"` for what is in this package, plus the entry points that installed
packages offer under the registry's group (`compress.passes`, `compress.metrics`, `compress.formats`,
`compress.runtimes`). A module is imported when its class is asked for, never before. A name of this package cannot be
taken over by an installed package.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from compress.errors import CompressError, RecipeError, nearest

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo


#: Before the name of a metric of the Hugging Face hub.
HUB = "hub:"


class Registry:
    """The classes of one kind, by name. `kind` is the word that messages use ("pass")."""

    def __init__(self, kind: str, table: Mapping[str, str], group: str):
        self.kind = kind
        self.table = dict(table)
        self.group = group

    def names(self) -> list[str]:
        """All names, sorted, those of installed packages included. Imports none of them."""
        return sorted({*self.table, *(point.name for point in entry_points(group=self.group))})

    def __contains__(self, name: object) -> bool:
        return name in self.table or name in self.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def get(self, name: str) -> Any:
        """The class called `name`, imported now.

        Raises RecipeError for a name that does not exist, CompressError for an installed package's entry point that
        cannot be imported, or that two packages offer.
        """
        if name in self.table:
            module, _, attribute = self.table[name].partition(":")
            return getattr(import_module(module), attribute)
        points = [point for point in entry_points(group=self.group) if point.name == name]
        if not points:
            raise RecipeError(self.unknown(name))
        if len({point.value for point in points}) > 1:
            owners = " and ".join(sorted(_owner(point) for point in points))
            raise CompressError(f'{self.kind} "{name}" is offered by {owners}: uninstall one of them.')
        return self._load(points[0])

    def unknown(self, name: object) -> str:
        """The sentence for a name that is not here, with all that are and the nearest one."""
        names = self.names()
        return f'unknown {self.kind} "{name}"; allowed: {", ".join(names)}.{nearest(str(name), names)}'

    def _load(self, point: EntryPoint) -> Any:
        where = f'{self.kind} "{point.name}" of the installed package {_owner(point)}'
        try:
            found = point.load()
        except Exception as error:  # whatever a foreign module raises while it is imported
            reason = f"{type(error).__name__}: {error}"
            raise CompressError(f"{where} cannot be imported from {point.value} ({reason}).") from error
        if not isinstance(found, type):
            raise CompressError(f"{where}: {point.value} is not a class.")
        own = getattr(found, "name", point.name)
        if isinstance(own, str) and own != point.name:
            raise CompressError(f'{where}: its class calls itself "{own}"; both names must be the same.')
        return found


class MetricRegistry(Registry):
    """The metrics; `hub:<name>` is one that `evaluate` loads from the Hugging Face hub."""

    def __contains__(self, name: object) -> bool:
        return (isinstance(name, str) and name.startswith(HUB) and len(name) > len(HUB)) or super().__contains__(name)

    def get(self, name: str) -> Any:
        if not name.startswith(HUB):
            return super().get(name)
        from compress.measure.hub_metric import hub_metric

        return hub_metric(name)


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.value


PASSES = Registry(
    "pass",
    {
        "alps": "compress.passes.alps:ALPS",
        "autoround": "compress.passes.autoround:AutoRound",
        "awq": "compress.passes.awq:AWQ",
        "block_distill": "compress.passes.block_distill:BlockDistill",
        "bnb": "compress.passes.bnb:Bnb",
        "depth": "compress.passes.depth:Depth",
        "distill": "compress.passes.distill:Distill",
        "efficientqat": "compress.passes.efficientqat:EfficientQAT",
        "experts": "compress.passes.experts:Experts",
        "fp8": "compress.passes.fp8:FP8",
        "gptq": "compress.passes.gptq:GPTQ",
        "hqq": "compress.passes.hqq:HQQ",
        "kv_cache": "compress.passes.kv_cache:KVCache",
        "llm_qat": "compress.passes.llm_qat:LLMQAT",
        "lora": "compress.passes.lora:LoRA",
        "magnitude": "compress.passes.magnitude:Magnitude",
        "quantize": "compress.passes.quantize:Quantize",
        "repair": "compress.passes.repair:Repair",
        "rotate": "compress.passes.rotate:Rotate",
        "rtn": "compress.passes.rtn:RTN",
        "smoothquant": "compress.passes.smoothquant:SmoothQuant",
        "sparsegpt": "compress.passes.sparsegpt:SparseGPT",
        "vocab": "compress.passes.vocab:Vocab",
        "wanda": "compress.passes.wanda:Wanda",
        "width": "compress.passes.width:Width",
    },
    "compress.passes",
)
FORMATS = Registry(
    "format",
    {
        "bitsandbytes": "compress.formats.bitsandbytes:BitsAndBytes",
        "compressed-tensors": "compress.formats.compressed_tensors:CompressedTensors",
        "dense": "compress.formats.dense:Dense",
        "gguf": "compress.formats.gguf:GGUF",
        "onnx": "compress.formats.onnx:Onnx",
        "packed": "compress.formats.packed:Packed",
    },
    "compress.formats",
)
RUNTIMES = Registry(
    "runtime",
    {
        "llama.cpp": "compress.measure.llama_cpp:LlamaCpp",
        "onnxruntime": "compress.measure.onnxruntime_engine:OnnxRuntime",
        "transformers": "compress.measure.runtimes:Transformers",
    },
    "compress.runtimes",
)
METRICS = MetricRegistry(
    "metric",
    {
        "accuracy": "compress.measure.metrics:Accuracy",
        "bits_per_byte": "compress.measure.metrics:BitsPerByte",
        "bits_per_weight": "compress.measure.metrics:BitsPerWeight",
        "decode_tokens_per_second": "compress.measure.metrics:DecodeTokensPerSecond",
        "energy_joules_per_token": "compress.measure.metrics:EnergyJoulesPerToken",
        "exact_match": "compress.measure.metrics:ExactMatch",
        "f1": "compress.measure.metrics:F1",
        "first_token_seconds": "compress.measure.metrics:FirstTokenSeconds",
        "kl_divergence": "compress.measure.metrics:KLDivergence",
        "kl_divergence_p99": "compress.measure.metrics:KLDivergenceP99",
        "kv_cache_bytes_per_token": "compress.measure.metrics:KVCacheBytesPerToken",
        "matthews_correlation": "compress.measure.metrics:MatthewsCorrelation",
        "parameters": "compress.measure.metrics:Parameters",
        "peak_memory_bytes": "compress.measure.metrics:PeakMemoryBytes",
        "perplexity": "compress.measure.metrics:Perplexity",
        "prefill_tokens_per_second": "compress.measure.metrics:PrefillTokensPerSecond",
        "resident_weights_bytes": "compress.measure.metrics:ResidentWeightsBytes",
        "rouge_l": "compress.measure.metrics:RougeL",
        "top1_agreement": "compress.measure.metrics:Top1Agreement",
        "weights_bytes": "compress.measure.metrics:WeightsBytes",
    },
    "compress.metrics",
)


class Option(NamedTuple):
    """One option of a pass, in words: `default` is as it would stand in a recipe, or "required"."""

    name: str
    type: str
    default: str
    allowed: str
    description: str


def pass_options(name: str) -> list[Option]:
    """What `passes: [- name: {...}]` can say, from the fields of the pass. Raises RecipeError for an unknown pass."""
    return _options(PASSES.get(name), "")


def _options(cls: Any, prefix: str) -> list[Option]:
    """The fields of a model, and those of models in them under dotted names."""
    options = []
    for name, field in cls.model_fields.items():
        value: Any = None if field.is_required() else field.get_default(call_default_factory=True)
        words = yaml_words(value.model_dump(exclude_defaults=True) if hasattr(value, "model_dump") else value)
        default = "required" if field.is_required() else words
        description = " ".join((field.description or "").split())
        dotted = f"{prefix}{name}"
        options.append(Option(dotted, type_words(field.annotation), default, allowed_words(field), description))
        for inner in models_in(field.annotation):
            options += _options(inner, f"{dotted}.")
    return options


def models_in(annotation: Any) -> Iterator[Any]:
    """The pydantic models in a field's type, those in lists and unions included."""
    if isinstance(annotation, type) and hasattr(annotation, "model_fields"):  # an Annotated passes attributes on
        yield annotation
    for part in get_args(annotation):
        yield from models_in(part)


def yaml_words(value: Any, limit: int = 60) -> str:
    """`value` as it would stand in a recipe, on one line, cut at `limit` characters."""
    if isinstance(value, list | tuple):
        words = f"[{', '.join(yaml_words(item, limit) for item in list(value)[:limit])}]"
    elif isinstance(value, Mapping):
        pairs = list(value.items())[:limit]
        words = "{" + ", ".join(f"{key}: {yaml_words(item, limit)}" for key, item in pairs) + "}"
    elif isinstance(value, bool) or value is None:
        words = {True: "true", False: "false", None: "null"}[value]
    elif isinstance(value, str):
        words = '"' + value[: limit + 1].encode("unicode_escape").decode().replace('"', '\\"') + '"'
    else:
        words = str(value)
    return words if len(words) <= limit else words[: limit - 3] + "..."


_TYPES = {int: "whole number", float: "number", str: "text", bool: "true/false", type(None): "null", Any: "any"}


def type_words(annotation: Any) -> str:
    """A field's type in a word or two: "whole number", "list of text", "number or null"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_words(arguments[0])
    if origin is Literal:
        return " or ".join(dict.fromkeys(_TYPES.get(type(value), "text") for value in arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_words(part) for part in arguments))
    if origin in (list, tuple, set, frozenset):
        inner = [part for part in arguments if part is not Ellipsis]
        return f"list of {type_words(inner[0])}" if inner else "list"
    if origin is dict or annotation is dict or hasattr(annotation, "model_fields"):
        return "mapping"
    return _TYPES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def allowed_words(field: FieldInfo) -> str:
    """Which values a field takes: "2, 3, 4, 8", "a number from 0 to 1", "text or null"."""
    return _allowed(field.annotation, list(field.metadata))


def _allowed(annotation: Any, metadata: list[Any]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [part for item in arguments[1:] for part in getattr(item, "metadata", [item])]
        return _allowed(arguments[0], [*metadata, *inner])
    if origin is Literal:
        return ", ".join(value if isinstance(value, str) else yaml_words(value) for value in arguments)
    if origin in (Union, types.UnionType):
        parts = [part for part in arguments if not (part is int and float in arguments)]
        return " or ".join(dict.fromkeys(_allowed(part, metadata) for part in parts))
    if origin in (list, tuple, set, frozenset):
        inner = [part for part in arguments if part is not Ellipsis]
        return f"a list of {type_words(inner[0])}" if inner else "a list"
    if hasattr(annotation, "model_fields"):
        return f"a mapping with the keys {', '.join(annotation.model_fields)}"
    if annotation in (int, float):
        return ("a whole number" if annotation is int else "a number") + _bounds(metadata)
    words = {bool: "true, false", type(None): "null", str: "text", dict: "a mapping", Any: "any value"}
    if annotation is str:
        pattern = next((item.pattern for item in metadata if getattr(item, "pattern", None)), None)
        return f"text matching {pattern}" if pattern else "text"
    return words.get(origin or annotation, type_words(annotation))


def _bounds(metadata: list[Any]) -> str:
    """The limits among a field's metadata (annotated_types.Ge, Gt, Le, Lt, Interval, MultipleOf), in words."""
    bound = {
        key: getattr(item, key)
        for item in metadata
        for key in ("ge", "gt", "le", "lt", "multiple_of")
        if getattr(item, key, None) is not None
    }
    low = f"{bound['ge']}" if "ge" in bound else f"above {bound['gt']}" if "gt" in bound else ""
    high = f"{bound['le']}" if "le" in bound else f"below {bound['lt']}" if "lt" in bound else ""
    if "ge" in bound and "le" in bound:
        words = f" from {low} to {high}"
    elif low and high:
        words = f" {low} and {high}" if "lt" in bound else f" {low}, at most {high}"
        words = f" of at least {low} and {high}" if "ge" in bound else words
    elif low:
        words = f" of {low} or more" if "ge" in bound else f" {low}"
    else:
        words = (f" of {high} or less" if "le" in bound else f" {high}") if high else ""
    return words + (f", a multiple of {bound['multiple_of']}" if "multiple_of" in bound else "")
