"""Proof that an export is the model that was in memory, by the engine that it was written for.

`python -m compress.measure.export_check JOB.json` is the fresh process: it opens the export with the runtime and writes
the logits of the probe's tokens, and how the engine cuts the probe's texts into tokens. `verify_export` starts it and
compares.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.formats.gguf_tokenizer import PROBE_TEXT
from compress.measure.jobs import run_child
from compress.registry import FORMATS, RUNTIMES
from compress.reports.report import Export

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from compress.formats.base import Contents


def unverified(name: str, folder: Path, contents: Contents) -> list[Export]:
    """The entry of an export that was just written, if its format has a runtime of its own to check it."""
    form = FORMATS.get(name)()
    if form.runtime is None:
        return []
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    allowed = form.allowed_difference(contents)
    exactly = form.allowed_exactly(contents)
    return [
        Export(
            format=name, path=f"exports/{name}", bytes=size, by=form.runtime, allowed=allowed, allowed_exactly=exactly
        )
    ]  # fmt: skip


def verify_export(
    output: Path,
    export: Export,
    ids: Tensor,
    logits: Tensor,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    workdir: Path,
    threads: int = 1,
) -> Export:
    """The entry with what its engine gave. `ids`: int64 [n, length]; `logits` [n, length, vocabulary], any float dtype,
    of the model in memory.

    CompressError where the engine cannot open it, or its log-likelihoods or its tokens are not the model's.
    """
    folder = output / export.path
    texts = [] if tokenizer is None else [PROBE_TEXT, *tokenizer.batch_decode(ids, skip_special_tokens=True)]
    found, exact, tokens = engine_output(folder, export.by, ids, texts, workdir, threads=threads)
    if found.shape != logits.shape:
        raise CompressError(
            f"{folder} was reloaded by {export.by} and is another model: its output has shape {tuple(found.shape)}, "
            f"the model in memory gave {tuple(logits.shape)}. The export is not verified."
        )
    divergence, difference = likelihood_differences(logits, found, ids)
    if not (difference <= export.allowed and divergence <= export.allowed**2):
        raise CompressError(
            f"{folder} was reloaded by {export.by} and differs from the model in memory: log-likelihoods by "
            f"{difference:.3g} nats a token ({export.allowed:g} is allowed), KL {divergence:.3g} "
            f"({export.allowed**2:.3g} is). The export is not verified."
        )
    stored = None
    if exact is not None:
        stored = max(likelihood_differences(logits, exact, ids))
        if not stored <= export.allowed_exactly:
            raise CompressError(
                f"{folder} was reloaded by {export.by} and differs from the model in memory where nothing but its "
                f"weights is rounded: by {stored:.3g} nats a token, {export.allowed_exactly:g} is allowed. The export "
                "is not verified."
            )
    same = None
    if tokenizer is not None and tokens is not None:
        if said := tokens_differ(export.by, tokenizer, texts, tokens):
            raise CompressError(f"{folder}: {said}. The export is not verified.")
        same = True
    return export.model_copy(
        update={
            "reloaded": True,
            "kl_divergence": divergence,
            "mean_logprob_difference": difference,
            "exact_difference": stored,
            "same_tokens": same,
        }
    )


def likelihood_differences(logits: Tensor, found: Tensor, ids: Tensor) -> tuple[float, float]:
    """Mean KL divergence (logits || found) over all positions, and the mean difference, without sign, of the text's
    next tokens' log-likelihoods; nats. Logits [n, length, vocabulary], ids int64 [n, length]."""
    ours, theirs = (each.double().log_softmax(-1) for each in (logits.cpu(), found))
    divergence = (ours.exp() * (ours - theirs)).sum(-1).mean()
    following = ids[:, 1:, None].cpu()
    difference = (ours - theirs)[:, :-1].gather(2, following).abs().mean() if following.numel() else divergence
    return float(divergence), float(difference)


def tokens_differ(
    engine: str, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], tokens: list[list[list[int]]]
) -> str | None:
    """Where an engine's tokens (without and with special ones, of each text) are not the tokenizer's; or None."""
    for text, found in zip(texts, tokens, strict=True):
        for special, given in zip((False, True), found, strict=True):
            wanted = tokenizer(text, add_special_tokens=special)["input_ids"]
            if wanted != given:
                place = next((i for i, (a, b) in enumerate(zip(wanted, given, strict=False)) if a != b), len(wanted))
                return (
                    f"{engine} cuts a text into other tokens than the model's tokenizer, the first at place {place}: "
                    f"{given[place : place + 3]} instead of {wanted[place : place + 3]}"
                )
    return None


def tokens_by_engine(file: Path, texts: Sequence[str]) -> list[list[list[int]]]:
    """How llama.cpp, in a fresh process, cuts texts by the tokenizer of a GGUF file that holds nothing else."""
    job = {"tokenizer": str(file), "texts": list(texts), "folder": str(file), "runtime": "llama.cpp"}
    found: list[list[list[int]]] = _in_a_process(job, file.parent, "reading the tokenizer by llama.cpp", 1)["tokens"]
    return found


def engine_output(
    folder: Path, runtime: str, ids: Tensor, texts: Sequence[str], workdir: Path, *, threads: int = 1
) -> tuple[Tensor, Tensor | None, list[list[list[int]]] | None]:
    """Float32 logits [n, length, vocabulary] of an export in a fresh process; those of its exact arithmetic, where it
    has one; and each text's tokens: without and with special ones (None where the engine has no tokenizer)."""
    from safetensors.torch import load_file, save_file

    workdir.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="export-", dir=workdir))
    try:
        save_file({"ids": ids.contiguous()}, work / "ids.safetensors")
        job = {"folder": str(folder), "runtime": runtime, "texts": list(texts), "threads": threads}
        values = _in_a_process(job, work, f"loading {folder} by {runtime}", threads)
        output = {name: tensor.clone() for name, tensor in load_file(work / "output.safetensors").items()}
        return output["output"], output.get("exact"), values["tokens"]
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _in_a_process(job: dict[str, Any], work: Path, what: str, threads: int) -> dict[str, Any]:
    """What the job gives, done by a fresh process with `work` for its files."""
    (work / "job.json").write_text(json.dumps({**job, "out": str(work)}), encoding="utf-8")
    command = [sys.executable, "-m", "compress.measure.export_check", str(work / "job.json")]
    run_child(command, what=what, threads=threads, out=work)
    values: dict[str, Any] = json.loads((work / "result.json").read_text(encoding="utf-8"))
    return values


def main(job_file: str) -> int:
    """Does the job; returns the exit status. What goes wrong comes back as a sentence in `result.json`."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    out = Path(job["out"])
    try:
        values: dict[str, Any] = _opened(job, out)
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        values = {"error": f"{job['folder']} cannot be run by {job['runtime']}: {text[:500]}"}
    (out / "result.json").write_text(json.dumps(values), encoding="utf-8")
    return int("error" in values)


def _opened(job: dict[str, Any], out: Path) -> dict[str, Any]:
    if "tokenizer" in job:
        from compress.measure.llama_cpp import tokens_of_file

        return {"tokens": tokens_of_file(Path(job["tokenizer"]), job["texts"])}
    import numpy as np
    import torch
    from safetensors.torch import load_file, save_file

    runtime, folder = RUNTIMES.get(job["runtime"])(), Path(job["folder"])
    ids = load_file(out / "ids.safetensors")["ids"].tolist()
    engine = runtime.open(folder, threads=job["threads"], device="cpu")
    try:
        rows = [engine.logits(row) for row in ids]
        tokens = [[engine.tokens(text, special=special) for special in (False, True)] for text in job["texts"]]
    finally:
        engine.close()
    if any(row is None for row in rows):
        raise CompressError("its engine tells no logits, so nothing can be compared")
    found = {"output": rows}
    exact = runtime.exact(folder, threads=job["threads"])  # once the engine has given back what it held
    if exact is not None:
        found["exact"] = [exact(row) for row in ids]
    save_file({name: torch.from_numpy(np.stack(each)) for name, each in found.items()}, out / "output.safetensors")
    return {"tokens": None if any(None in pair for pair in tokens) else tokens}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
