"""Numbers as people read them."""

from __future__ import annotations

import re

#: Plain names of the metrics, in the order in which tables show them.
NAMES = {
    "perplexity": "Perplexity",
    "bits_per_byte": "Bits per byte of text",
    "accuracy": "Accuracy",
    "f1": "F1, mean of the classes",
    "matthews_correlation": "Matthews correlation",
    "exact_match": "Exact answers",
    "rouge_l": "ROUGE-L of answers",
    "kl_divergence": "KL divergence, nats per token",
    "kl_divergence_p99": "KL divergence, 99th percentile of tokens",
    "top1_agreement": "Same most likely token",
    "weights_bytes": "Weights on disk",
    "bits_per_weight": "Bits per weight",
    "parameters": "Parameters",
    "resident_weights_bytes": "Weights in memory",
    "peak_memory_bytes": "Peak memory",
    "kv_cache_bytes_per_token": "KV cache per token",
    "prefill_tokens_per_second": "Prefill speed",
    "decode_tokens_per_second": "Decode speed",
    "first_token_seconds": "Time to first token",
    "energy_joules_per_token": "Energy per token",
}


def title(metric: str) -> str:
    """`accuracy/grammar` -> `Accuracy: grammar`."""
    base, _, area = metric.partition("/")
    name = NAMES.get(base, base.replace("_", " ").capitalize())
    return f"{name}: {area.replace('_', ' ')}" if area else name


def order(metrics: list[str]) -> list[str]:
    """The metrics in the order of tables: known ones first, areas right after their metric, `batch 4` before 16."""
    known = list(NAMES)

    def key(metric: str) -> tuple[int, str, list[tuple[int, str]]]:
        base, _, area = metric.partition("/")
        words = [(int(word), "") if word.isdigit() else (-1, word) for word in re.findall(r"[0-9]+|[^0-9]+", area)]
        return (known.index(base) if base in known else len(known), base, words)

    return sorted(metrics, key=key)


def number(value: float) -> str:
    """About four significant digits; whole numbers without a point, thousands set apart."""
    size = abs(value)
    if size >= 1000 or value == int(value):
        return f"{value:,.0f}"
    if size < 0.001:
        return f"{value:.2e}"
    digits = 4 if size < 0.1 else 3 if size < 10 else 2 if size < 100 else 1
    return f"{value:.{digits}f}"


def scaled(value: float, unit: str, steps: tuple[str, ...], base: float = 1000.0) -> str:
    """`1500, "B", ("", "k", "M")` -> `1.5 kB`."""
    size, step = abs(value), 0
    while size >= base and step < len(steps) - 1:
        size, step = size / base, step + 1
    sign = "-" if value < 0 else ""
    return f"{sign}{number(size)} {steps[step]}{unit}".rstrip()


def human(value: float | None, unit: str) -> str:
    """A value with its unit: bytes as MB, fractions as %, seconds as ms."""
    if value is None:
        return "–"
    match unit:
        case "B":
            return scaled(value, "B", ("", "k", "M", "G", "T"))
        case "fraction":
            return f"{100 * value:.1f} %"
        case "s":
            return duration(value)
        case "tokens/s":
            return f"{number(value)} tok/s"
        case "weights":
            return scaled(value, "", ("", "k", "M", "G"))
        case "" | "perplexity" | "nats/token" | "nats" | "bits/byte":
            return number(value)
        case _:
            return f"{number(value)} {unit}"


def duration(seconds: float | None) -> str:
    """Seconds as `12 ms`, `3.2 s`, `4 min 05 s` or `2 h 10 min`."""
    if seconds is None:
        return "–"
    if abs(seconds) < 1:
        return f"{number(1000 * seconds)} ms"
    if abs(seconds) < 100:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def change(delta: float | None, ratio: float | None, unit: str) -> str:
    """The change as a person says it: points for fractions, otherwise percent; the plain difference without a ratio."""
    if delta is None:
        return "–"
    if unit == "fraction":
        return f"{100 * delta:+z.1f} pt"
    if ratio is None:
        return f"{'+' if delta >= 0 else '-'}{human(abs(delta), unit)}"
    if delta == 0:
        return "the same"
    return percent(ratio - 1, sign=True)


def from_to(before: str, after: str) -> str:
    """`143 tok/s`, `146 tok/s` -> `143 → 146 tok/s`: a unit that both share is said once."""
    number, _, unit = before.partition(" ")
    return f"{number} → {after}" if unit and after.partition(" ")[2] == unit else f"{before} → {after}"


def percent(share: float, sign: bool = False) -> str:
    """`0.059` -> `5.9 %`, whole numbers from 10 % on; with `sign`, `+5.9 %`."""
    value = 100 * share
    digits = 0 if abs(value) >= 10 else 1
    return f"{value:+z.{digits}f} %" if sign else f"{value:z.{digits}f} %"


def interval(low: float | None, high: float | None, start: float | None, unit: str) -> str:
    """The interval of a change, said as `change` says it: points for fractions, percent of `start`, the value before,
    otherwise; plain where there is none."""
    if low is None or high is None:
        return "–"
    if unit == "fraction":
        return f"{100 * low:+z.1f} to {100 * high:+z.1f} pt"
    if not start:
        return f"{human(low, unit)} to {human(high, unit)}"
    ends = [percent(end / start, sign=True).removesuffix(" %") for end in (low, high)]
    return f"{ends[0]} to {ends[1]} %"


def short(value: float) -> str:
    """Two significant digits, for cells that are read beside others."""
    if value == 0:
        return "0"
    if abs(value) >= 10:
        return f"{value:,.0f}"
    if abs(value) < 0.001:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    digits = 1 if abs(value) >= 1 else 2 if abs(value) >= 0.1 else 3 if abs(value) >= 0.01 else 4
    return f"{value:.{digits}f}"
