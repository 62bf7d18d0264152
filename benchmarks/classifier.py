"""A classifier from an encoder: trained whole, and by LoRA; then half of its blocks, taught by the whole one.

    python benchmarks/classifier.py ENCODER --training FILE --evaluation FILE --name NAME [--epochs 3]

ENCODER: a folder with an encoder without a head (MiniLM, BERT); the files: lines of text + label. All are measured on
the same evaluation texts; the half model is timed in turn with the whole one. `--unlabelled`: more text for the half,
lines with a text of which the whole model says the class. Writes `results/classifier-NAME.json` and `.md`.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from arguments import arguments, write_result
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import compress
from compress.reports.report import Report

METRICS = ["accuracy", "f1", "weights_bytes", "prefill_tokens_per_second"]
#: Texts that the teacher labels at once.
BATCH = 64


def with_head(encoder: str, training: str, folder: Path) -> str:
    """The encoder with a head of random weights for the labels of the training text, as a folder."""
    with open(training, encoding="utf-8") as lines:
        labels = sorted({json.loads(line)["label"] for line in lines})
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=len(labels), dtype="float32")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)
    return str(folder)


def with_more_text(teacher: Path, options: Any, place: Path) -> str:
    """The training text and, with the classes that the teacher says, the texts that have none, as one file."""
    model = AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    lines = Path(options.training).read_text(encoding="utf-8").splitlines()
    given = [line for file in options.unlabelled for line in Path(file).read_text(encoding="utf-8").splitlines()]
    texts = [json.loads(line)["text"] for line in given if line.strip()]
    for start in range(0, len(texts), BATCH):
        part = texts[start : start + BATCH]
        cut = tokenizer(part, padding=True, truncation=True, max_length=options.length, return_tensors="pt")
        with torch.no_grad():
            said = model(**cut).logits.argmax(-1).tolist()
        lines += [json.dumps({"text": text, "label": label}) for text, label in zip(part, said, strict=True)]
    found = place / "more.jsonl"
    found.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(found)


def shown(value: Any) -> Any:
    """An option without the folders of this machine."""
    if isinstance(value, list):
        return [shown(one) for one in value]
    return Path(value).name if isinstance(value, str) else value


def table(rows: dict[str, Any]) -> str:
    """The rows as Markdown, and what the half model keeps."""
    figures = ("accuracy", "f1", "weights_bytes", "prefill_tokens_per_second")
    lines = ["| model | " + " | ".join(figures) + " | seconds of training |", "|---|" + "---|" * (len(figures) + 1)]
    for name, row in rows.items():
        cells = [f"{row['compressed'].get(key) or 0:,.4g}" for key in figures]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {row['training_seconds']:.0f} |")
    teacher, student = rows["half, distilled"]["original"], rows["half, distilled"]["compressed"]
    kept, faster = (student[key] / teacher[key] for key in ("accuracy", "prefill_tokens_per_second"))
    lines += ["", f"The half model keeps {kept:.1%} of the accuracy and reads {faster:.2f} times as fast (in turn)."]
    return "\n".join(lines) + "\n"


def recipes(options: Any, per_epoch: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Options of the passes: the whole encoder trained, adapters, and half of it taught by the whole one."""
    whole = {
        "losses": ["labels"], "steps": options.epochs * per_epoch, "batch_size": options.batch_size,
        "learning_rate": 5e-5,
    }  # fmt: skip
    lora = {
        "purpose": "task", "r": 8, "modules_to_save": ["classifier"], "epochs": options.epochs,
        "batch_size": options.batch_size, "learning_rate": 1e-3, "held_out": 0.1, "merge": True,
    }  # fmt: skip
    half = {
        "student": {"layers": options.kept or "50%"},
        "losses": [
            {"kl": {"temperature": 2}}, {"hidden": {"weight": options.hidden_weight}}, {"labels": {"weight": 0.5}},
        ],
        "steps": options.distill_steps or options.distill_epochs * per_epoch,
        "batch_size": options.batch_size, "learning_rate": 1e-4,
    }  # fmt: skip
    return whole, lora, half


def main() -> None:
    options = arguments(
        __doc__,
        "training",
        calibration={},
        training={"required": True},
        epochs={"type": int, "default": 3},
        batch_size={"type": int, "default": 16},
        distill_epochs={"type": int, "default": 6},
        distill_steps={"type": int},
        unlabelled={"nargs": "*", "default": []},
        kept={"type": int, "nargs": "*"},
        hidden_weight={"type": float, "default": 0.1},
        no_lora={"action": "store_true"},
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
        whole, lora, half = recipes(options, per_epoch)
        run("whole", base, [{"distill": whole}], place / "whole")
        if not options.no_lora:
            run("lora", base, [{"lora": lora}], place / "lora")
        if options.unlabelled:
            text["training"]["source"] = with_more_text(place / "whole" / "model", options, place)
        run("half, distilled", str(place / "whole" / "model"), [{"distill": half}], place / "half")
    text_table = table(rows)
    named = {key: shown(value) for key, value in vars(options).items()}
    result = {"options": named, "rows": rows}
    write_result(f"classifier-{options.name}", result, text_table)
    print(text_table)


if __name__ == "__main__":
    main()
