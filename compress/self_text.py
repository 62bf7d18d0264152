"""Text that a model writes itself, to be trained on: as much as is wanted, of the very distribution that is to be kept.

Liu et al. 2023 (LLM-QAT, arXiv 2305.17888, section 2.1) generate all of their training text so. Here it is added to the
text at hand: a small text seen many times is learnt by heart, text seen once is not.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from compress.progress import Progress

#: Bytes of keys and values that the windows written side by side may take.
CACHE_BUDGET = 256 << 20


@torch.no_grad()
def write_text(
    model: PreTrainedModel, first: Tensor, length: int, seed: int, title: str, progress: Progress | None = None,
    kept: Path | None = None,
) -> Tensor:  # fmt: skip
    """Windows of token ids [n, length] (int64) sampled from the model's own distribution, temperature 1; window `i`
    begins with `first[i]` ([n], int64). An end of text does not end a window: the next text follows, as in packed
    windows. `kept`: a file to keep them in, and to take them from if it is there."""
    if kept is not None and kept.exists():
        return load_file(kept)["tokens"]
    batch = max(1, min(len(first), CACHE_BUDGET // (length * _cache_bytes(model))))
    parts = []
    starts = range(0, len(first), batch)
    devices = [model.device] if model.device.type == "cuda" else []
    showing = (progress or Progress()).step(f"{title}: writing text", total=len(starts))
    with showing as step, torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for start in starts:
            prompt = first[start : start + batch, None].to(model.device)
            written = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=length - 1, min_new_tokens=length - 1, eos_token_id=[], pad_token_id=0,
            )  # fmt: skip
            parts.append(written.cpu())
            step.advance()
    tokens = torch.cat(parts)
    if kept is not None:
        partial = kept.with_suffix(".partial")
        save_file({"tokens": tokens}, partial)
        partial.rename(kept)
    return tokens


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


def _cache_bytes(model: PreTrainedModel) -> int:
    """Of the keys and values of one token."""
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * width * model.dtype.itemsize)
