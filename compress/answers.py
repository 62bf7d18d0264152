"""What a teacher writes to prompts, kept as a data set that a student is trained on (sequence-level distillation).

Kim and Rush 2016 (arXiv 1606.07947): the student learns the teacher's own answers. With reasons (Hsieh et al. 2023,
Distilling step-by-step, arXiv 2305.02301, section 3): the teacher reasons before it answers, both are parted, and the
student learns each as a task of its own, so that it can answer without the reasons.

Texts, not tokens, pass from teacher to student, so their tokenizers may differ.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from compress.checkpoint import atomic_write_text, disk_errors
from compress.data import Windows
from compress.distillation import ANSWER, RATIONALE
from compress.errors import CompressError, StartError
from compress.examples import IGNORED
from compress.measure.items import Request, encode, score
from compress.progress import Progress
from compress.text import BUILTIN, Document, documents

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compress.losses import Rationale
    from compress.teaching import TeacherSource

#: Prompts answered side by side, and between two files of what is written: what a killed run loses at most.
BATCH, SHARD = 32, 256
#: Prompts taken of a source that has no end.
DEFAULT_SAMPLES = 1024


class Answers(BaseModel):
    """What the teacher is to write, and what of it is kept."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    prompts: str = Field(
        min_length=1,
        description="A .jsonl file of prompt + completion, question + choices + label, or text (a prompt with no right "
        "answer known), or `builtin:<name>`.",
    )
    samples: int | None = Field(default=None, ge=1, description="Prompts to take; all of a file, 1024 of `builtin:`.")
    areas: list[str] | None = Field(default=None, description="Of `builtin:`, the areas to take; all if absent.")
    n: int = Field(default=1, ge=1, description="Answers to each prompt.")
    sampling: Literal["greedy", "sample"] = Field(
        default="greedy", description="The likeliest answer, or one drawn from the teacher's distribution."
    )
    temperature: float = Field(default=1.0, gt=0, le=10, description="Of that distribution.")
    max_tokens: int = Field(default=128, ge=1, description="Most tokens of an answer; longer ones are left out.")
    stop: list[str] = Field(default_factory=list, description="Texts that end an answer, as the end of text does.")
    filter: Literal["answer", "likelihood", "none"] = Field(
        default="none",
        description="answer: kept where its last word is that of the right one; likelihood: the share `keep` that the "
        "teacher itself finds likeliest, by token; none: all.",
    )
    keep: float = Field(default=0.5, gt=0, le=1, description="Of `filter: likelihood`: the share that is kept.")
    ask: str = Field(default="", description="Text after a prompt that asks for reasons, with a `rationale` loss.")
    mark: str = Field(
        default="So",
        min_length=1,
        description="Where the answer begins after reasons: the last one of this text.",
    )


Line = dict[str, str]


def answers_of(
    source: TeacherSource, options: Answers, reasons: bool, folder: Path, seed: int, progress: Progress | None = None
) -> tuple[Path, list[Line]]:
    """The data set under `folder`, written by the teacher where it is not there yet: its file, and its lines.

    A line has `prompt`, `completion`, and with `reasons` the `rationale` that came before it. The file is named by the
    fingerprint of all that decides it. StartError where no prompt is found, CompressError where no answer is left.
    """
    prompts = list(_prompts(options, seed))
    if not prompts:
        raise StartError(f"answers.prompts: {options.prompts} holds no prompts.")
    content = [source.identity, options.model_dump(mode="json"), prompts, reasons, seed]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
    path = folder / f"answers-{digest}.jsonl"
    if not path.exists():
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):  # a second run that wants the same waits for it
            if not path.exists():
                raw = _written(source, options, reasons, prompts, path, seed, progress or Progress())
                _finish(path, raw, _filtered(source, options, raw, reasons), options, reasons)
            for shard in _shards(path, len(prompts)):
                shard.unlink(missing_ok=True)
    return path, [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def refuse_measured(lines: Sequence[Mapping[str, str]], tasks: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """StartError where a prompt is one that the benchmark asks."""
    asked = {str(item.get("prompt", item.get("question"))) for items in tasks.values() for item in items}
    both = sum(line["prompt"] in asked for line in lines)
    if both:
        raise StartError(
            f"answers.prompts: {both} of {len(lines)} are test items of the benchmark as well. What is measured must "
            "not have been learnt: use other prompts."
        )


def _finish(path: Path, raw: Sequence[Line], kept: Sequence[Line], options: Answers, reasons: bool) -> None:
    """Writes the data set; CompressError where nothing is left."""
    if not kept:
        raise CompressError(
            f"answers: of {len(raw)} answers none is left (filter: {options.filter}; an answer of more than "
            f"{options.max_tokens} tokens{', or without reasons,' if reasons else ''} does not count)."
        )
    atomic_write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))


def _prompts(options: Answers, seed: int) -> Iterable[Line]:
    """`prompt`, and `reference` where the right answer is known."""
    if options.prompts.startswith(BUILTIN):
        lines: Iterable[Document] = _builtin(options, seed)
    else:
        lines = documents(options.prompts, Path.cwd(), "training", seed)
    asked = (line for line in map(_prompt, lines) if line is not None)
    return itertools.islice(asked, options.samples)


def _builtin(options: Answers, seed: int) -> Iterator[Document]:
    """Different questions of the embedded model's own world, those of its training text, an area after the other."""
    from compress.builtin.text import areas, item

    unknown = sorted(set(options.areas or ()) - set(areas()))
    if unknown:
        raise StartError(f"answers.areas: there is no {', '.join(unknown)}; allowed: {', '.join(areas())}.")
    wanted = options.samples or DEFAULT_SAMPLES
    seen: set[str] = set()
    for index in range(20 * wanted):
        for area in options.areas or areas():
            fields = item(area, "training", seed, index)
            asked = str(fields.get("prompt", fields.get("question", "")))
            if asked and asked not in seen and len(seen) < wanted:
                seen.add(asked)
                yield Document(fields, f"{options.prompts}:{area}:{index}")


def _prompt(document: Document) -> Line | None:
    fields = document.fields
    if document.kind == "completion":
        return {"prompt": fields["prompt"], "reference": fields["completion"]}
    if document.kind == "choice":
        return {"prompt": fields["question"], "reference": fields["choices"][fields["label"]]}
    return {"prompt": fields["text"]} if document.kind == "text" else None


def _shards(path: Path, prompts: int) -> list[Path]:
    return [path.with_suffix(f".{number:06d}.part") for number in range(-(-prompts // SHARD))]


def _written(
    source: TeacherSource, options: Answers, reasons: bool, prompts: Sequence[Line], path: Path, seed: int,
    progress: Progress,
) -> list[Line]:  # fmt: skip
    """All answers, those cut off at `max_tokens` left out; shard by shard, so that a killed run goes on."""
    shards = _shards(path, len(prompts))
    found: list[Line] = []
    with progress.step("answers", total=len(shards)) as step:
        for number, shard in enumerate(shards):
            if not shard.exists():
                part = prompts[number * SHARD : (number + 1) * SHARD]
                lines = _answered(source, options, reasons, part, seed + number)
                atomic_write_text(shard, json.dumps(lines))
            found += json.loads(shard.read_text(encoding="utf-8"))
            step.advance()
    return found


@torch.no_grad()
def _answered(source: TeacherSource, options: Answers, reasons: bool, prompts: Sequence[Line], seed: int) -> list[Line]:
    model, tokenizer = source.model, source.tokenizer
    if tokenizer is None:
        raise StartError("answers: the teacher has no tokenizer, so it cannot be asked.")
    asked = [line["prompt"] + (options.ask if reasons else "") for line in prompts]
    found = []
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), BATCH):
            rows = [number for number in range(start, min(start + BATCH, len(prompts))) for _ in range(options.n)]
            texts = generate_texts(model, tokenizer, [asked[number] for number in rows], options)
            found += [
                {**prompts[number], "written": text}
                for number, text in zip(rows, texts, strict=True)
                if text is not None and text.strip()
            ]
    unique = {json.dumps(line, sort_keys=True): line for line in found}  # n draws may be the same
    return list(unique.values())


def generate_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], options: Answers
) -> list[str | None]:
    """What the model writes after each prompt, up to an end or a stop; None where it came to neither."""
    encoded = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    if tokenizer.bos_token_id is not None:
        encoded = [[tokenizer.bos_token_id, *ids] for ids in encoded]
    width = max(map(len, encoded))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.full((len(encoded), width), padding)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(encoded):
        ids[row, width - len(tokens) :] = torch.tensor(tokens)
        mask[row, width - len(tokens) :] = 1
    drawn = {"do_sample": True, "temperature": options.temperature, "top_k": 0, "top_p": 1.0}
    how: dict[str, Any] = drawn if options.sampling == "sample" else {"do_sample": False}
    if options.stop:
        how |= {"stop_strings": options.stop, "tokenizer": tokenizer}
    ends = tokenizer.eos_token_id
    given = model.generate(
        ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=options.max_tokens,
        pad_token_id=padding, eos_token_id=ends, **how,
    )  # fmt: skip
    return [_text(tokenizer, row.tolist(), ends, options.stop) for row in given[:, width:].cpu()]


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int], end: int | None, stop: Sequence[str]) -> str | None:
    ended = end is not None and end in ids
    text = str(tokenizer.decode(list(itertools.takewhile(lambda token: token != end, ids)), skip_special_tokens=True))
    places = [text.index(word) for word in stop if word in text]
    if places:
        return text[: min(places)]
    return text if ended else None


def _filtered(source: TeacherSource, options: Answers, raw: Sequence[Mapping[str, str]], reasons: bool) -> list[Line]:
    """The lines of the data set."""
    kept = [line for line in raw if options.filter != "answer" or _is_right(line, options)]
    if options.filter == "likelihood":
        assert source.tokenizer is not None
        requests = [encode(source.tokenizer, line["prompt"], line["written"]) for line in kept]
        each = [a.log_likelihood / _scored(r) for a, r in zip(score(source.model, requests), requests, strict=True)]
        best = sorted(range(len(kept)), key=lambda i: -each[i])[: max(1, round(options.keep * len(kept)))]
        kept = [kept[i] for i in sorted(best)]
    lines = [_line(entry, options.mark if reasons else None) for entry in kept]
    return [line for line in lines if line is not None]


def _scored(request: Request) -> int:
    return max(1, len(request.ids) - request.start)


def _is_right(line: Mapping[str, str], options: Answers) -> bool:
    if "reference" not in line:
        raise StartError("answers.filter: answer needs prompts with right answers (prompt + completion, or choices).")
    return last_word(line["written"]) == last_word(line["reference"])


def last_word(text: str) -> str:
    """What an answer comes down to: its last word, marks at its ends and case left out.

    >>> last_word("7+5=12, carry 1. So 132.")
    '132'
    """
    words = text.split()
    return words[-1].strip(".,;:!?\"'()*$").casefold() if words else ""


def _line(entry: Mapping[str, str], mark: str | None) -> Line | None:
    """One line of the data set; None where reasons are wanted and there are none."""
    written = entry["written"]
    if mark is None:
        return {"prompt": entry["prompt"], "completion": written}
    place = written.rfind(mark)
    if place <= 0 or not written[:place].strip():
        return None
    blank = "" if not written[:1].isspace() else " "
    return {"prompt": entry["prompt"], "completion": blank + written[place:], "rationale": written[:place].rstrip()}


def answer_windows(
    lines: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase, rationale: Rationale | None,
    context: int | None, source: str,
) -> tuple[Windows, Tensor | None]:  # fmt: skip
    """Windows with the completions as labels, padded on the right, and with `rationale` the task of each: for every
    line one that answers and one that gives reasons."""
    rows: list[tuple[str, str, int]] = []
    for line in lines:
        prefix = "" if rationale is None else rationale.answer_prefix
        rows.append((prefix + line["prompt"], line["completion"], ANSWER))
        if rationale is not None and line.get("rationale"):
            rows.append((rationale.rationale_prefix + line["prompt"], line["rationale"], RATIONALE))
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    requests = [encode(tokenizer, before, after, None if context is None else context - 1) for before, after, _ in rows]
    width = max(len(request.ids) for request in requests) + len(end)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    tokens = torch.full((len(rows), width), padding)
    labels, mask = torch.full_like(tokens, IGNORED), torch.zeros(len(rows), width, dtype=torch.bool)
    for row, request in enumerate(requests):
        ids = torch.tensor([*request.ids, *end])
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
        labels[row, request.start : len(ids)] = ids[request.start :]
    digest = hashlib.sha256(json.dumps([list(map(dict, lines)), tokens.tolist()]).encode()).hexdigest()
    tasks = None if rationale is None else torch.tensor([task for *_, task in rows])
    return Windows(tokens, digest, source, int(mask.sum()), "training", mask, labels=labels), tasks
