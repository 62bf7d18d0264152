"""A full report with every kind of content: no run needed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from compress.reports.report import Comparison, Figure, GoalResult, Report, Stage, Verified

EXACT = "not measured: this machine has no energy counter"


def figure(value, unit, higher=False, **more) -> Figure:
    return Figure(value=value, unit=unit, higher_is_better=higher, runtime="transformers", **more)


def _worse(delta, before, sentence="worse by 1") -> Comparison:
    return Comparison(
        delta=delta, ratio=(before + delta) / before, ci_low=delta * 0.9, ci_high=delta * 1.1, verdict="worse",
        sentence=sentence,
    )  # fmt: skip


def build(name: str = "four-bits", decode: float = 100.0, verdict: str = "no_difference") -> Report:
    original = {
        "perplexity": figure(3.4, "perplexity", stderr=0.03, n=128),
        "accuracy": figure(0.94, "fraction", True, n=400),
        "accuracy/facts": figure(0.96, "fraction", True, n=200),
        "accuracy/two_hop": figure(0.92, "fraction", True, n=200),
        "weights_bytes": figure(11_534_336, "B"),
        "decode_tokens_per_second": figure(100.0, "tokens/s", True, n=7),
        "energy_joules_per_token": Figure(value=None, reason="this machine has no energy counter"),
    }
    compressed = {
        **original,
        "perplexity": figure(3.6, "perplexity", n=128),
        "accuracy": figure(0.87, "fraction", True, n=400),
        "accuracy/facts": figure(0.82, "fraction", True, n=200),
        "weights_bytes": figure(3_670_016, "B"),
        "decode_tokens_per_second": figure(decode, "tokens/s", True, n=7),
    }
    comparison = {
        "perplexity": _worse(0.2, 3.4, "worse by 0.200 (95 % interval 0.180 to 0.220)"),
        "accuracy": _worse(-0.07, 0.94),
        "accuracy/facts": _worse(-0.14, 0.96, "worse by 14.0 points (95 % interval 12.6 to 15.4)"),
        "accuracy/two_hop": Comparison(
            delta=0, ratio=1, ci_low=-0.01, ci_high=0.01, verdict="no_difference", sentence="="
        ),
        "weights_bytes": Comparison(delta=-7864320, ratio=0.3182, verdict="better", sentence="3.14 times smaller"),
        "decode_tokens_per_second": Comparison(delta=decode - 100, ratio=decode / 100, verdict=verdict, sentence="-"),
        "energy_joules_per_token": Comparison(sentence=EXACT),
    }
    blocks = [
        {"name": f"model.layers.{i}", "error": 0.01 * (i + 1), "layers": {"mlp.down_proj": {"loss": 0.02 * i}}}
        for i in range(4)
    ]
    stage = Stage(
        **{"pass": "gptq"}, options={"bits": 4, "skip": []}, seconds=21.7, coverage=0.97, blocks=blocks,
        predicted={"peak_memory_bytes": 83_000_000, "weights_bytes": 3_670_016}, peak_memory_bytes=79_100_000,
    )  # fmt: skip
    return Report(
        name=name, recipe={"model": "builtin:tiny", "passes": [{"gptq": {"bits": 4}}]}, digest="3f2a",
        environment={"torch": "2.13.0", "ram_bytes": 25_000_000_000, "data": {"evaluation": {"windows": 128}}},
        original=original, stages=[stage], compressed=compressed, comparison=comparison,
        goals=[GoalResult(metric="perplexity", goal="+2%", met=False, value=3.6)],
        verified=Verified(reloaded=True, max_logit_difference=0.0),
        generations=[{"prompt": "Who <b>is</b> it?", "original": "Mila & Oren", "compressed": "<script>x()</script>"}],
        notes=["A note."],
    )  # fmt: skip


@pytest.fixture
def make_report() -> Callable[..., Report]:
    return build
