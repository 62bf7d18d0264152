"""The quality part of the benchmark stage: what is asked of the measuring process, and what its answers are kept as."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.locating import classes_of, context_length
from compress.measure.jobs import JobResult, key_of
from compress.measure.measurements import BenchmarkJob, Measurements
from compress.measure.running import Place
from compress.measure.text_bytes import why_foreign

if TYPE_CHECKING:
    from torch import Tensor

    from compress.measure.vocabularies import Pairing

PROMPT_TOKENS = 48
HEADLESS = "the model has no head that gives next-token probabilities"
NO_BYTES = "the model's folder holds no tokenizer, so the bytes of its tokens are not known"
#: The area of texts with labels.
CLASSES = "classes"


def quality(
    found: Measurements, job: BenchmarkJob, place: Place, state: str, *, causal: bool, original: Measurements | None
) -> None:
    """Fills in the records of windows, items, tasks and classes, and the count of parameters.

    `original`: the one that `found` is compared with, None where it is the original itself; `state` names the content
    of the folders for what is kept.
    """
    foreign = None
    if original is not None and causal:
        foreign = why_foreign(original.folder, found.folder)
    _reasons(found, job, causal, foreign)
    request, inputs = _request(found, job, causal, original, foreign)
    pairing = None
    if "windows" in inputs and original is not None and causal and foreign is None:
        pairing = _paired(original, found, job)
    if pairing is not None:
        inputs |= {"new_windows": pairing.windows, "token_of": pairing.token_of, "shared": pairing.shared}
    title = "compressed: quality" if original else "original: quality"
    result = place.run(request, title, inputs=inputs, key=_key(state, job, request, inputs), reusable=True)
    if pairing is not None:
        found.notes.append(_vocabulary_note(pairing, result.records))
    _keep(found, job, result)
    if foreign is not None and original is not None and "windows" in inputs:
        _same_text(found, original, job, place, request, inputs, result)
    _note(found, result)


def _key(state: str, job: BenchmarkJob, request: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> str:
    anywhere = {**request, "model": "", "original": "", "reference": request["reference"] is not None}
    return key_of(state, job.tasks_state, anywhere, *inputs.values())


def _request(
    found: Measurements, job: BenchmarkJob, causal: bool, original: Measurements | None, foreign: str | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The job for the measuring process, and its windows."""
    text = causal and (job.wants("text") or job.wants("reference"))
    classes = job.labels is not None and (job.wants("items") or job.wants("classes"))
    asked = causal and (job.wants("items") or job.wants("answers"))
    reference = original if text and job.wants("reference") and foreign is None else None
    items = {area: [dict(item) for item in entries] for area, entries in job.items.items()} if asked else {}
    request = {
        "kind": "quality", "model": str(found.folder), "dtype": "auto" if original else job.dtype,
        "original": str(found.folder if original is None else original.folder),
        "reference": None if reference is None or job.windows is None else str(reference.folder),
        "reference_dtype": job.dtype, "classes": classes, "as_text": foreign is not None,
        "items": items, "written": causal and job.wants("answers"),
        "tasks": list(job.tasks) if causal and job.wants("items") else [], "limit": job.limit,
        "prompts": list(job.prompts) if causal else [], "prompt_tokens": PROMPT_TOKENS,
        "device": job.device, "threads": job.threads, "seed": job.seed,
    }  # fmt: skip
    inputs: dict[str, Tensor] = {}
    if (text or classes) and job.windows is not None:
        inputs = {"windows": job.windows} if job.mask is None else {"windows": job.windows, "mask": job.mask}
    if classes and original is not None:
        _check_classes(original.folder, found.folder)
    return request, inputs


def _reasons(found: Measurements, job: BenchmarkJob, causal: bool, foreign: str | None) -> None:
    """Why a figure may be missing, by what it needs."""
    from compress.opening import read_config

    classifies = classes_of(read_config(found.folder)) is not None
    unlabelled = "the evaluation text has no labels (data.evaluation: lines of text + label)"
    text = foreign or (job.windows_reason if causal else HEADLESS)
    found.reasons["text"] = found.reasons["reference"] = text
    if causal and not foreign and job.windows is not None:
        found.reasons["bits_per_byte"] = NO_BYTES
    items = "no items were given (benchmark.tasks)"
    found.reasons["items"] = items if causal else unlabelled if classifies else HEADLESS
    found.reasons["answers"] = "no items of prompt + completion were given (benchmark.tasks)" if causal else HEADLESS
    found.reasons["classes"] = unlabelled if classifies else "the model does not classify texts"


def _check_classes(original: Path, folder: Path) -> None:
    from compress.opening import read_config

    before, after = classes_of(read_config(original)), classes_of(read_config(folder))
    if before != after:
        raise CompressError(
            f"{folder} does not tell the same classes as the original ({', '.join(after or ['none'])} instead of "
            f"{', '.join(before or ['none'])}), so what they say cannot be compared."
        )


def _paired(original: Measurements, found: Measurements, job: BenchmarkJob) -> Pairing | None:
    """The windows in the new model's tokens, where its tokenizer was cut."""
    from compress.measure.runtimes import read_config
    from compress.measure.vocabularies import pair

    assert job.windows is not None
    context = context_length(read_config(found.folder))
    return pair(original.folder, found.folder, job.windows, job.mask, context)


def _vocabulary_note(pairing: Pairing, records: Mapping[str, Tensor]) -> str:
    from compress.measure.vocabularies import note

    tokens = float(records["tokens"].sum())
    return note(pairing, float(records["mass"].sum()) / tokens if "mass" in records else None)


def _keep(found: Measurements, job: BenchmarkJob, result: JobResult) -> None:
    """The answers as records per window and item."""
    values = result.values
    found.records |= {key: value.numpy() for key, value in result.records.items()}
    found.records["parameters"] = [values["parameters"]]
    found.generations = values.get("generations", [])
    found.worst = values.get("worst", [])
    scores: dict[str, list[float]] = dict(values.get("correct") or {})
    found.item_texts = [text for area in scores for text in job.shown(area)]
    for area, task in (values.get("tasks") or {}).items():
        scores[area] = task["scores"]
        found.item_texts += list(zip(task["texts"], task["answers"], strict=True))
        found.task_metrics[area] = {task["metric"]: sum(task["scores"]) / len(task["scores"]), **task["others"]}
    if "predicted" in found.records and job.labels is not None:
        found.records["label"] = job.labels.numpy()
        right = found.records["predicted"] == found.records["label"]
        scores[CLASSES] = right.astype(float).tolist()
        texts = values.get("class_texts") or [""] * len(right)
        found.item_texts += [
            (text, job.class_names.get(int(i), str(int(i)))) for text, i in zip(texts, job.labels, strict=True)
        ]
    if scores:
        found.records["correct"] = [score for each in scores.values() for score in each]
        found.records["area"] = [area for area, each in scores.items() for _ in each]
    if values.get("written"):
        found.records |= {key: values[key] for key in ("written", "wanted")}


def _same_text(
    found: Measurements, original: Measurements, job: BenchmarkJob, place: Place, request: dict[str, Any],
    inputs: dict[str, Tensor], result: JobResult,
) -> None:  # fmt: skip
    """The original on the same text, which its tokenizer cuts as that of the other model does: both alone."""
    again = {
        **request, "model": str(original.folder), "dtype": job.dtype, "items": {}, "written": False, "tasks": [],
        "prompts": [],
    }  # fmt: skip
    from compress.measure.jobs import fingerprint

    key = _key(fingerprint(original.folder), job, again, inputs)
    before = place.run(again, "original: the same text", inputs=inputs, key=key, reusable=True)
    found.records["reference_text_nll"] = before.records["text_nll"].numpy()
    found.records["reference_text_bytes"] = before.records["text_bytes"].numpy()
    words = (
        "The models' tokenizers differ: perplexity, KL divergence and top-1 agreement are left out, since a token of "
        "one is not a token of the other. bits_per_byte was taken on the text of the evaluation windows, cut anew by "
        "each model's own tokenizer."
    )
    unknown = max(each.values.get("unknown_tokens", 0) for each in (before, result))
    if unknown:
        words += f" {unknown} tokens of it are unknown to a tokenizer, for which bits_per_byte is too good."
    found.notes.append(words)


def _note(found: Measurements, result: JobResult) -> None:
    found.notes += [note for note in result.values["notes"] if note not in found.notes]
    for need in ("text", "reference", "items", "files", "classes", "answers"):
        found.runtimes[need] = result.values["runtime"]
