"""How long the pruning passes take on a Llama with random weights, as multiples of the forward passes that they need.

    python benchmarks/pruning_speed.py [--layers 12] [--dtype bfloat16] [--samples 32] [--length 512] [--threads 2]
        [--passes wanda sparsegpt] [--rounds 2]

The model and the text are those of `gptq_speed.py`. A pass looks at each block's inputs and then passes the text on:
two forward passes through the blocks, which are timed bare, without hooks, before and after each pass, so that a
machine that is slow for a while is slow for both. Zeros: 50 % unstructured. Of the rounds the median counts. Writes
`benchmarks/results/pruning_speed.json`.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gptq_speed import model_of, shaped, tokens_of

RESULTS = Path(__file__).parent / "results" / "pruning_speed.json"
FORWARDS = 2


@torch.no_grad()
def forward_seconds(layers: int, dtype: str, samples: int, length: int) -> float:
    """Seconds of one pass of the text through the bare blocks."""
    blocks = model_of(layers, dtype).model
    batches = tokens_of(samples, length).split(max(1, 2048 // length))
    blocks(input_ids=batches[0], use_cache=False)  # what is prepared at the first call is not counted
    started = time.perf_counter()
    for batch in batches:
        blocks(input_ids=batch, use_cache=False)
    return time.perf_counter() - started


def pass_seconds(name: str, layers: int, dtype: str, samples: int, length: int) -> float:
    """Seconds of a pass, the model being loaded."""
    from compress.registry import PASSES

    model, tokens = model_of(layers, dtype), tokens_of(samples, length)
    started = time.perf_counter()
    PASSES.get(name)(sparsity=0.5)(model, calibration=tokens)
    return time.perf_counter() - started


def main() -> int:
    parser = shaped(__doc__)
    parser.add_argument("--passes", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    from compress.measure.environment import environment

    torch.set_num_threads(options.threads)
    shape = (options.layers, options.dtype, options.samples, options.length)
    rows: list[dict[str, Any]] = []
    for name in options.passes:
        ratios, seconds, bare = [], [], [forward_seconds(*shape)]
        for _ in range(options.rounds):
            seconds.append(pass_seconds(name, *shape))
            bare.append(forward_seconds(*shape))
            ratios.append(seconds[-1] / (FORWARDS * (bare[-2] + bare[-1]) / 2))
        rows.append(
            {"pass": name, "seconds": [round(s, 2) for s in seconds], "forward seconds": [round(s, 2) for s in bare],
             "of the forward passes": round(statistics.median(ratios), 3)}
        )  # fmt: skip
        print(rows[-1], flush=True)
    result = {
        "environment": environment(threads=options.threads, device="cpu"),
        "layers": options.layers, "dtype": options.dtype, "samples": options.samples, "length": options.length,
        "rows": rows,
    }  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
