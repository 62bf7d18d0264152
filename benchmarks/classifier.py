"""A classifier from an encoder: trained whole, and by LoRA; then half of its blocks, taught by the whole one.

    python benchmarks/classifier.py ENCODER --training FILE --evaluation FILE --name NAME [--epochs 3]

ENCODER: a folder with an encoder without a head (MiniLM, BERT); the files: lines of text + label. All are measured on
the same evaluation texts; the half model is timed in turn with the whole one. Writes `results/classifier-NAME.json` and
`.md`.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from arguments import arguments, write_result
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import compress
from compress.reports.report import Report

METRICS = ["accuracy", "f1", "weights_bytes", "prefill_tokens_per_second"]


def with_head(encoder: str, training: str, folder: Path) -> str:
    """The encoder with a head of random weights for the labels of the training text, as a folder."""
    with open(training, encoding="utf-8") as lines:
        labels = sorted({json.loads(line)["label"] for line in lines})
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=len(labels), dtype="float32")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)
    return str(folder)


def table(rows: dict[str, Any]) -> str:
    """The rows as Markdown, and what the half model keeps."""
    shown = ("accuracy", "f1", "weights_bytes", "prefill_tokens_per_second")
    lines = ["| model | " + " | ".join(shown) + " | seconds of training |", "|---|" + "---|" * (len(shown) + 1)]
    for name, row in rows.items():
        cells = [f"{row['compressed'].get(key) or 0:,.4g}" for key in shown]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {row['training_seconds']:.0f} |")
    teacher, student = rows["half, distilled"]["original"], rows["half, distilled"]["compressed"]
    kept, faster = (student[key] / teacher[key] for key in ("accuracy", "prefill_tokens_per_second"))
    lines += ["", f"The half model keeps {kept:.1%} of the accuracy and reads {faster:.2f} times as fast (in turn)."]
    return "\n".join(lines) + "\n"


def main() -> None:
    options = arguments(
        __doc__,
        "training",
        calibration={},
        training={"required": True},
        epochs={"type": int, "default": 3},
        batch_size={"type": int, "default": 16},
        distill_epochs={"type": int, "default": 6},
    )
    with open(options.training, encoding="utf-8") as lines:
        per_epoch = sum(1 for _ in lines) // options.batch_size
    text = {
        "training": {"source": options.training, "length": options.length},
        "evaluation": {"source": options.evaluation, "length": options.length},
    }
    rows: dict[str, Any] = {}

    def run(name: str, model: str, passes: list[dict[str, Any]], folder: Path) -> Report:
        started = time.monotonic()
        report = compress.run({
            "model": model, "data": text, "passes": passes, "output": str(folder), "benchmark": {"metrics": METRICS},
        })  # fmt: skip
        seconds = sum(stage.seconds or 0.0 for stage in report.stages)
        rows[name] = {
            "compressed": {key: figure.value for key, figure in report.compressed.items()},
            "original": {key: figure.value for key, figure in report.original.items()},
            "comparison": {key: found.sentence for key, found in report.comparison.items()},
            "training_seconds": seconds, "seconds": time.monotonic() - started,
        }  # fmt: skip
        print(name, json.dumps(rows[name]), flush=True)
        return report

    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        base = with_head(options.model, options.training, place / "base")
        whole = {
            "losses": ["labels"], "steps": options.epochs * per_epoch, "batch_size": options.batch_size,
            "learning_rate": 5e-5,
        }  # fmt: skip
        lora = {
            "purpose": "task", "r": 8, "modules_to_save": ["classifier"], "epochs": options.epochs,
            "batch_size": options.batch_size, "learning_rate": 1e-3, "held_out": 0.1, "merge": True,
        }  # fmt: skip
        half = {
            "student": {"layers": "50%"},
            "losses": [{"kl": {"temperature": 2}}, {"hidden": {"weight": 0.1}}, {"labels": {"weight": 0.5}}],
            "steps": options.distill_epochs * per_epoch, "batch_size": options.batch_size, "learning_rate": 1e-4,
        }  # fmt: skip
        run("whole", base, [{"distill": whole}], place / "whole")
        run("lora", base, [{"lora": lora}], place / "lora")
        run("half, distilled", str(place / "whole" / "model"), [{"distill": half}], place / "half")
    text_table = table(rows)
    named = {key: Path(value).name if isinstance(value, str) else value for key, value in vars(options).items()}
    result = {"options": named, "rows": rows}
    write_result(f"classifier-{options.name}", result, text_table)
    print(text_table)


if __name__ == "__main__":
    main()
