"""Text that a model writes itself, to be trained on: as much as is wanted, of the very distribution that is to be kept.

Liu et al. 2023 (LLM-QAT, arXiv 2305.17888, section 2.1) generate all of their training text so. Here it is added to the
text at hand: a small text seen many times is learnt by heart, text seen once is not.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from compress.checkpoint import disk_errors
from compress.errors import StartError
from compress.progress import Progress

if TYPE_CHECKING:
    from compress.data import Windows
    from compress.passes.base import Context
    from compress.shapes import ModelShape

#: Bytes of keys and values that the windows written side by side may take at most.
CACHE_BUDGET = 256 << 20
#: The same on the CPU, unless the weights take more: keys and values are copied with every token, and those that leave
#: the processor's caches cost more than reading the weights less often saves.
SMALL_BUDGET = 32 << 20
#: Seconds between two times that what is written so far is kept.
SAVE_SECONDS = 60.0


def with_written(
    windows: Windows, teacher: Callable[[], PreTrainedModel], tokens: int, context: Context, title: str, *,
    folder: Path | None, identity: Mapping[str, str] | None = None, vocabulary: int | None = None,
    most: int | None = None,
) -> Windows:  # fmt: skip
    """The windows, and as many more as hold `tokens` that the teacher writes (0: none). Each begins with a token drawn
    from the given text, as windows cut from a stream begin anywhere in a text.

    What is written is kept in `folder` (None: nowhere) under a name that tells teachers apart by `identity`, and
    `teacher()` is opened only where it is not there yet. Ids are below `vocabulary` (None: any). Of more than `most`
    windows in all, given ones make room. StartError for padded windows.
    """
    if not tokens:
        return windows
    if windows.mask is not None:
        raise StartError(f"{title}: generated text comes in whole windows: leave out `pack: false`.")
    count = max(1, tokens // windows.length)
    count = count if most is None else min(count, most)
    draw = torch.Generator().manual_seed(context.seed)
    first = windows.tokens.flatten()[torch.randint(0, windows.tokens.numel(), (count,), generator=draw)]
    kept = None
    if folder is not None:
        content = [dict(identity or {}), windows.length, context.seed, vocabulary, first.tolist()]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        kept = folder / f"written-{digest[:32]}.safetensors"
    written = write_text(
        teacher, first, windows.length, context.seed, title, context.progress, kept=kept, vocabulary=vocabulary
    )
    given = len(windows) if most is None else min(len(windows), most - count)
    return windows.select(torch.arange(given)).followed_by(written)


def write_text(
    teacher: Callable[[], PreTrainedModel], first: Tensor, length: int, seed: int, title: str,
    progress: Progress | None = None, *, kept: Path | None = None, vocabulary: int | None = None,
) -> Tensor:  # fmt: skip
    """Windows of token ids [n, length] (int64) sampled from a model's own distribution, temperature 1; window `i`
    begins with `first[i]` ([n], int64). An end of text does not end a window: the next text follows, as in packed
    windows. `kept`: a file to keep them in, and to take them from if it is there; then the teacher is not opened, and
    of processes that want the same one writes. `vocabulary`: ids from there on are not written."""
    if kept is None:
        return _sampled(teacher(), first, length, seed, title, progress, vocabulary, None)
    with disk_errors(kept.parent):
        kept.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(kept.with_suffix(".lock")):
        if not kept.exists():
            begun = kept.with_suffix(".begun")
            _save(kept, {"tokens": _sampled(teacher(), first, length, seed, title, progress, vocabulary, begun)})
            begun.unlink(missing_ok=True)
    return load_file(kept)["tokens"]


@torch.no_grad()
def _sampled(
    model: PreTrainedModel, first: Tensor, length: int, seed: int, title: str, progress: Progress | None,
    vocabulary: int | None, begun: Path | None,
) -> Tensor:  # fmt: skip
    """As `write_text`, which keeps it. `begun`: where so far written windows are kept from minute to minute, with the
    state of the random numbers, so that a killed run ends with the same text."""
    check_writes(model, title)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    batch = _side_by_side(model.config, model.dtype.itemsize, len(first), length, weights, model.device.type)
    on_gpu = model.device.type == "cuda"
    width = int(model.config.get_text_config().vocab_size)
    beyond = list(range(width if vocabulary is None else vocabulary, width)) or None
    tokens, saved = first.new_empty(0, length), time.monotonic()
    showing = (progress or Progress()).step(f"{title}: writing text", total=len(first))
    with showing as step, torch.random.fork_rng(devices=[model.device] if on_gpu else []):
        torch.manual_seed(seed)
        if begun is not None and begun.exists():
            found = load_file(begun)
            tokens = found["tokens"]
            torch.cuda.set_rng_state(found["random"], model.device) if on_gpu else torch.set_rng_state(found["random"])
            step.advance(parts=len(tokens))
        while len(tokens) < len(first):
            prompt = first[len(tokens) : len(tokens) + batch, None].to(model.device)
            written = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=length - 1, min_new_tokens=length - 1, eos_token_id=[], pad_token_id=0,
                suppress_tokens=beyond,
            )  # fmt: skip
            tokens = torch.cat([tokens, written.cpu()])
            step.advance(parts=len(written))
            if begun is not None and time.monotonic() - saved > SAVE_SECONDS:
                random = torch.cuda.get_rng_state(model.device) if on_gpu else torch.get_rng_state()
                _save(begun, {"tokens": tokens, "random": random})
                saved = time.monotonic()
    return tokens


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    """Whole or not there."""
    partial = path.with_suffix(".partial")
    with disk_errors(path):
        save_file(tensors, partial)
        partial.rename(path)


def check_writes(model: PreTrainedModel, title: str) -> None:
    """StartError for a model that cannot write text out of nothing (an encoder, with a decoder or without)."""
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise StartError(f"{title}: generated: {type(model).__name__} writes no text of its own: leave it out.")


def writing_bytes(shape: ModelShape, tokens: int, length: int) -> int:
    """What it takes to have so many tokens written by the model that `shape` was before any pass, beside its weights:
    keys and values, those of one block once more while a token is added, and four copies of the likelihoods of the next
    one."""
    if not tokens:
        return 0
    config, itemsize = shape.original_config, shape.dtype.itemsize
    text = config.get_text_config()
    windows = _side_by_side(config, itemsize, max(1, tokens // length), length, shape.original_bytes)
    cache = windows * length * _cache_bytes(config, itemsize)
    return int(cache + cache // text.num_hidden_layers + 4 * 4 * windows * text.vocab_size)


def _side_by_side(
    config: PretrainedConfig, itemsize: int, windows: int, length: int, weights: int, device: str = "cpu"
) -> int:
    """Windows written at a time by a model of so many bytes of weights."""
    least = CACHE_BUDGET if device == "cuda" else SMALL_BUDGET
    budget = min(CACHE_BUDGET, max(least, weights))
    return int(max(1, min(windows, budget // (length * _cache_bytes(config, itemsize)))))


@torch.no_grad()
def continued(
    model: PreTrainedModel, ids: Tensor, labels: Tensor | None, padding: int = 0
) -> tuple[Tensor, Tensor | None, Tensor]:
    """What the model makes of the beginnings of windows [batch, length], drawn from its distribution by torch's own
    generator: ids, mask (None: nothing is padded), and the ids again with -100 on what it was given.

    `labels`: a window begins with what comes before its first label, and may end early. Without, it begins with its
    first quarter.
    """
    batch, length = ids.shape
    if labels is None:
        start = max(1, length // 4)
        written = _generated(model, ids[:, :start], torch.ones_like(ids[:, :start]), length - start, [], padding)
        told = written.clone()
        told[:, :start] = -100
        return written, None, told
    starts = (labels != -100).int().argmax(1).clamp_min(1)
    widest = int(starts.max())
    prompts, mask = ids.new_full((batch, widest), padding), ids.new_zeros((batch, widest))
    for row, start in enumerate(starts.tolist()):
        prompts[row, widest - start :] = ids[row, :start]
        mask[row, widest - start :] = 1
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    new = _generated(model, prompts, mask, max(1, length - widest), ends, padding)[:, widest:]
    over = torch.isin(new, ids.new_tensor(ends)).int().cumsum(1)
    alive = (over == 0) | ((over == 1) & torch.isin(new, ids.new_tensor(ends)))
    width = widest + new.shape[1]
    written, kept = ids.new_full((batch, width), padding), ids.new_zeros((batch, width))
    told = ids.new_full((batch, width), -100)
    for row, start in enumerate(starts.tolist()):
        count = int(alive[row].sum())
        written[row, :start], written[row, start : start + count] = ids[row, :start], new[row, :count]
        told[row, start : start + count] = new[row, :count]
        kept[row, : start + count] = 1
    return written, kept, told


def _generated(
    model: PreTrainedModel, prompts: Tensor, mask: Tensor, new: int, ends: list[int], padding: int
) -> Tensor:
    least = {} if ends else {"min_new_tokens": new}
    result: Tensor = model.generate(
        prompts, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new,
        eos_token_id=ends, pad_token_id=padding, **least,
    )  # fmt: skip
    return result


def _cache_bytes(config: PretrainedConfig, itemsize: int) -> int:
    """Of the keys and values of one token."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * width * itemsize)
