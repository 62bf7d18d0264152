"""Rank correlation of an encoder's sentence similarities with people's, before and after compression.

    python benchmarks/similarity.py MODEL --calibration FILE.jsonl --pairs FILE.jsonl --name NAME [--pairs-used 1500]

`--pairs`: JSON lines with sentence1, sentence2 and a number under --score. Sentences are embedded by the mean of the
last hidden state over their tokens; the figure is Spearman's correlation of the cosine with the score, with a paired
bootstrap over pairs for the difference to the original. Writes benchmarks/results/similarity-NAME.json and .md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from transformers import AutoModel, AutoTokenizer

import compress

RESULTS = Path(__file__).parent / "results"
METHODS: dict[str, dict[str, Any]] = {
    "rtn 4 bits": {"rtn": {"bits": 4, "group_size": 64}},
    "rtn 3 bits": {"rtn": {"bits": 3, "group_size": 64}},
    "gptq 4 bits": {"gptq": {"bits": 4, "group_size": 64}},
    "gptq 3 bits": {"gptq": {"bits": 3, "group_size": 64}},
    "magnitude 50 %": {"magnitude": {"sparsity": 0.5}},
    "wanda 50 %": {"wanda": {"sparsity": 0.5}},
}


@torch.inference_mode()
def cosines(folder: str | Path, pairs: list[dict[str, Any]]) -> np.ndarray:
    """Cosine of each pair's embeddings, by plain transformers from the folder, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    sides = []
    for key in ("sentence1", "sentence2"):
        rows = []
        for start in range(0, len(pairs), 64):
            texts = [pair[key] for pair in pairs[start : start + 64]]
            batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
            hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].float()
            rows.append((hidden * mask).sum(1) / mask.sum(1))
        sides.append(torch.cat(rows))
    return torch.nn.functional.cosine_similarity(*sides).double().numpy()


def difference(before: np.ndarray, after: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """95 % interval of the change of Spearman's correlation, over resampled pairs."""
    draw = np.random.default_rng(0)
    changes = []
    for _ in range(500):
        index = draw.integers(0, len(scores), len(scores))
        a, b = (stats.spearmanr(x[index], scores[index]).statistic for x in (before, after))
        changes.append(b - a)
    low, high = np.percentile(changes, [2.5, 97.5])
    return float(low), float(high)


def weights_kb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True, type=Path)
    parser.add_argument("--pairs", required=True, type=Path)
    parser.add_argument("--pairs-used", type=int, default=1500)
    parser.add_argument("--score", default="relatedness")
    parser.add_argument("--name", required=True)
    options = parser.parse_args()
    pairs = [json.loads(line) for line in options.pairs.read_text().splitlines()[: options.pairs_used]]
    scores = np.array([float(pair[options.score]) for pair in pairs])
    before = cosines(options.model, pairs)
    lines = ["| method | Spearman | 95 % of the change | weights kB | seconds |", "|---|---|---|---|---|"]
    spearman = stats.spearmanr(before, scores).statistic
    lines.append(f"| original | {spearman:.4f} | | {weights_kb(options.model):.0f} | |")
    rows = [{"method": "original", "spearman": spearman}]
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, pass_) in enumerate(METHODS.items()):
            recipe = {
                "model": str(options.model.resolve()), "passes": [pass_], "benchmark": False, "dtype": "float32",
                "data": {"calibration": {"source": str(options.calibration.resolve()), "length": 128}},
                "output": f"{scratch}/{number}",
            }  # fmt: skip
            report = compress.run(recipe)
            folder = Path(scratch) / str(number) / "model"
            after = cosines(folder, pairs)
            low, high = difference(before, after, scores)
            spearman = stats.spearmanr(after, scores).statistic
            seconds = report.stages[0].seconds
            rows.append({"method": name, "spearman": spearman, "low": low, "high": high, "seconds": seconds})
            size = weights_kb(folder)
            lines.append(f"| {name} | {spearman:.4f} | {low:+.4f} to {high:+.4f} | {size:.0f} | {seconds:.1f} |")
            print(lines[-1], flush=True)
    table = "\n".join(lines) + "\n"
    RESULTS.mkdir(exist_ok=True)
    result = {"pairs": len(pairs), "model": options.model.name, "rows": rows}
    (RESULTS / f"similarity-{options.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / f"similarity-{options.name}.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
