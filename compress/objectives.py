"""What is trained towards besides an original model: the text itself; and how a model is run while it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from compress.examples import IGNORED
from compress.model import find_stacks


class TextLoss(nn.Module):  # type: ignore[misc]
    """The model's own loss on text: cross entropy of each next token that is to be learnt, or of the class."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def train(self, mode: bool = True) -> TextLoss:
        """Switches dropout of adapters alone: the model's own was for when it was made."""
        switch_adapter_dropout(self, mode)
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        text = {"input_ids": input_ids} | ({} if attention_mask is None else {"attention_mask": attention_mask})
        logits = self.model(**text).logits
        if labels is not None and labels.dim() == 1:
            return functional.cross_entropy(logits.float(), labels)
        aims = learnt(input_ids, attention_mask, labels)[:, 1:].reshape(-1)
        logits = logits[:, :-1].reshape(len(aims), -1)
        total = functional.cross_entropy(logits.float(), aims, ignore_index=IGNORED, reduction="sum")
        return total / (aims != IGNORED).sum().clamp_min(1)


def learnt(input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
    """What is to be learnt of a batch [batch, length]: `labels` where there are any, else all but the padding."""
    if labels is not None:
        return labels
    return input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, IGNORED)


def switch_adapter_dropout(module: nn.Module, mode: bool) -> None:
    """Turns the dropout of peft's adapters on or off, and no other."""
    for name, child in module.named_modules():
        if ".lora_dropout." in name:
            child.training = mode


@contextmanager
def checkpointed(model: PreTrainedModel, wanted: bool = True) -> Iterator[None]:
    """Gradient checkpointing: of each block only its input is kept, and the block is run again for the gradient."""
    blocks = [block for stack in find_stacks(model) for block in stack.modules] if wanted else []
    cached = model.config.use_cache if hasattr(model.config, "use_cache") else None
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if wanted and cached is not None:
        model.config.use_cache = False  # a block that runs twice would add to the cache twice
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
        if cached is not None:
            model.config.use_cache = cached
