"""What the `quality` measurement does in its own process: one model's windows, items, tasks, classes and texts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.measure.worker import tell

Job = dict[str, Any]
Result = tuple[dict[str, Any], dict[str, Any]]
#: Characters of a text that is shown, and the new tokens of an answer beyond those of the wanted one.
CHARACTERS, BEYOND = 300, 8


def measure_quality(job: Job) -> Result:
    """Scores one model; beside `reference` (read in lock step) where KL is wanted.

    The job: `inputs` (a file of windows, mask, and how the windows read in another tokenizer), `classes` (say the class
    of each window), `as_text` (score the text of the windows, cut by the model's own tokenizer), `original` (whose
    tokenizer cut the windows), `items` by area, `written` (write answers to those with a completion), `tasks` of the
    harness with their `limit`, `prompts`.
    """
    from safetensors.torch import load_file

    from compress.allocator import settle_allocator
    from compress.measure.worker import count_parameters

    settle_allocator()
    folder = Path(job["model"])
    model, runtime, notes = load_for_quality(job, folder)
    values: dict[str, Any] = {"runtime": runtime, "notes": notes, "parameters": count_parameters(model)}
    records: dict[str, Any] = {}
    inputs = load_file(job["inputs"]) if job.get("inputs") else {}
    if inputs and job.get("classes"):
        records |= _classes(job, model, inputs, values)
    elif inputs and job.get("as_text"):
        records |= _texts(job, model, inputs, values)
    elif inputs:
        records |= _windows(job, model, inputs, values)
    if job.get("items") or job.get("prompts") or job.get("tasks"):
        values |= _answers(job, folder, model)
    return values, records


def _windows(job: Job, model: Any, inputs: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Log-likelihoods per window, and beside a reference the divergence from it."""
    import torch

    from compress.measure.likelihood import window_scores
    from compress.measure.runtimes import load_plain
    from compress.measure.text_bytes import byte_table, scored_bytes
    from compress.measure.vocabularies import Pairing, paired_scores, scored_tokens
    from compress.measure.worst import worst_windows
    from compress.opening import read_tokenizer

    windows, mask = inputs["windows"], inputs.get("mask")
    reference = None
    if job.get("reference"):
        reference = load_plain(Path(job["reference"]), dtype=job["reference_dtype"], device=job["device"])
    records: dict[str, Any] = {}
    if "token_of" in inputs:
        pairing = Pairing(inputs["new_windows"], inputs["token_of"], inputs["shared"], 0)
        scores, mass = paired_scores(model, windows, pairing, reference=reference, mask=mask)
        records = {"mass": mass} if reference is not None else {}
        scored = scored_tokens(inputs["token_of"], windows.shape[1])[:, 1:]
    else:
        told = partial(_windows_done, job, len(windows))
        scores = window_scores(model, windows, reference=reference, mask=mask, told=told)
        scored = torch.ones_like(windows[:, 1:], dtype=torch.bool) if mask is None else mask[:, 1:].bool()
    records |= {key: value for key, value in vars(scores).items() if value is not None}
    tokenizer = read_tokenizer(Path(job.get("original") or job["model"]))
    if tokenizer is None:
        return records
    table = byte_table(tokenizer, int(windows.max()) + 1)
    records |= {"text_nll": scores.nll.clone(), "text_bytes": scored_bytes(windows, scored, table)}
    if scores.kl is not None and scores.token_kl is not None:
        values["worst"] = worst_windows(windows, scores.kl, scores.tokens, scores.token_kl, scored, tokenizer)
    return records


def _windows_done(job: Job, windows: int, done: int) -> None:
    tell(job, done, windows, "windows of text")


def _texts(job: Job, model: Any, inputs: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The text of the windows as this model's tokenizer cuts it."""
    from compress.locating import context_length
    from compress.measure.runtimes import load_tokenizer
    from compress.measure.text_bytes import score_texts, window_texts

    texts = window_texts(inputs["windows"], inputs.get("mask"), load_tokenizer(Path(job["original"])))
    own = load_tokenizer(Path(job["model"]))
    nats, size, unknown = score_texts(model, own, texts, context_length(model.config))
    values["unknown_tokens"] = unknown
    return {"text_nll": nats, "text_bytes": size}


def _classes(job: Job, model: Any, inputs: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The class that the model says of each text."""
    from compress.measure.areas import predicted_classes
    from compress.opening import read_tokenizer

    windows, mask = inputs["windows"], inputs.get("mask")
    tokenizer = read_tokenizer(Path(job.get("original") or job["model"]))
    if tokenizer is not None:
        values["class_texts"] = [tokenizer.decode(row, skip_special_tokens=True)[:CHARACTERS] for row in windows]
    return {"predicted": predicted_classes(model, windows, mask)}


def _answers(job: Job, folder: Path, model: Any) -> dict[str, Any]:
    from compress.locating import context_length
    from compress.measure.items import score_items
    from compress.measure.runtimes import load_tokenizer

    tokenizer = load_tokenizer(folder)
    context = context_length(model.config)
    correct: dict[str, list[int]] = {}
    for area, items in job["items"].items():
        tell(job, sum(map(len, correct.values())), sum(map(len, job["items"].values())), f"items: {area}")
        correct[area] = score_items(model, tokenizer, items, context=context)
    found: dict[str, Any] = {"correct": correct}
    found["generations"] = [_written(job, model, tokenizer, text, job["prompt_tokens"]) for text in job["prompts"]]
    if job.get("written"):
        asked = [item for items in job["items"].values() for item in items if "completion" in item]
        found["wanted"] = [str(item["completion"]).strip() for item in asked]
        found["written"] = [_answer(job, model, tokenizer, item, context) for item in asked]
    if job.get("tasks"):
        from compress.measure.harness import score_tasks

        found["tasks"] = score_tasks(model, tokenizer, job["tasks"], context=context, limit=job.get("limit"))
    return found


def _answer(job: Job, model: Any, tokenizer: Any, item: dict[str, Any], context: int | None) -> str:
    """What the model writes after an item's prompt: at most a little more than was wanted, and no further line than
    that has."""
    wanted = str(item["completion"]).strip()
    tokens = len(tokenizer(wanted, add_special_tokens=False)["input_ids"]) + BEYOND
    written = _written(job, model, tokenizer, str(item["prompt"]).rstrip(), tokens, context).strip()
    return "\n".join(written.split("\n")[: wanted.count("\n") + 1]).strip()


def _written(job: Job, model: Any, tokenizer: Any, prompt: str, tokens: int, context: int | None = None) -> str:
    import torch

    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if context is not None:
        ids = ids[:, -max(1, context - tokens) :]
    ids = ids.to(job["device"])
    written = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, num_beams=1,
        use_cache=True, pad_token_id=0,
    )  # fmt: skip
    return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))


def load_for_quality(job: Job, folder: Path) -> tuple[Any, str, list[str]]:
    """Plain transformers wherever it can; else the packed runtime, with a note. The cache is packed if the folder's
    history says so, with a note."""
    from compress.loading import recorded_cache
    from compress.measure.runtimes import Transformers, is_compressed, load_plain
    from compress.nn.quant_cache import use_packed_cache

    spec = recorded_cache(folder)
    words = f"Quality was measured with keys and values read back from a cache of {spec.bits} bits." if spec else ""
    notes = [words] if spec else []
    try:
        model = load_plain(folder, dtype=job["dtype"], device=job["device"])
        use_packed_cache(model, spec)
        return model, "transformers", notes
    except CompressError as error:
        if not is_compressed(folder):
            raise
        loaded = Transformers().load(folder, dtype=job["dtype"], device=job["device"])
        return loaded.model, loaded.runtime, [f"Quality was measured through {loaded.runtime}: {error}", *notes]
