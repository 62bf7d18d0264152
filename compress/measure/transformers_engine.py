"""An Engine over a model of transformers, dense or run from its packed weights.

It calls the model's own `forward` with its own cache, as `generate` does, without the bookkeeping of `generate`: that
costs the same for every model, and hides what differs between them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.images import patches_of, reads_images
from compress.inputs import forward_inputs
from compress.locating import context_length
from compress.measure.engine import Engine
from compress.measure.weights import resident_weights, tensors_in
from compress.nn.quant_embedding import QuantEmbedding, TiedHead

#: Names under which models give their cache, and take it back.
CACHES = ("past_key_values", "cache_params", "state")


class TransformersEngine(Engine):
    """`model`: in evaluation mode, on its device. Rows are as many as fit in memory."""

    largest_batch = 1 << 16

    def __init__(self, model: Any, runtime: str = "transformers", note: str | None = None):
        self.model, self.runtime, self.note = model, runtime, note
        self.device: torch.device = next(model.parameters()).device
        self.context = context_length(model.config)
        self.generates = bool(model.can_generate())
        self.read_bytes = bytes_read(model)
        self.images = reads_images(model.config)
        last = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._last: dict[str, Any] = {"logits_to_keep": 1} if last else {}
        self._given: dict[str, Any] = {}
        self._logits: Tensor | None = None  # [rows, n, vocabulary], of what was read last
        self._unread: Tensor | None = None  # [rows, 1], the tokens written last

    def logits(self, ids: Sequence[int]) -> np.ndarray | None:
        if not self.generates or self.model.config.is_encoder_decoder:
            return None
        self._empty()
        with torch.inference_mode():
            found = self.model(input_ids=torch.tensor([list(ids)], device=self.device), use_cache=False).logits
        return np.asarray(found[0].float().cpu().numpy(), dtype=np.float32)

    def prefill(self, ids: Sequence[Sequence[int]]) -> None:
        self._empty()
        prompts = torch.tensor([list(row) for row in ids], device=self.device)
        with torch.inference_mode():
            if not self.generates:
                self.model(**forward_inputs(self.model, prompts))
            elif self.model.config.is_encoder_decoder:
                config = self.model.config
                start = getattr(config, "decoder_start_token_id", None)
                start = (config.pad_token_id or 0) if start is None else start
                self._given = {"encoder_outputs": self.model.get_encoder()(input_ids=prompts)}
                self._forward(prompts.new_full((len(prompts), 1), start))
            else:
                self._forward(prompts)
        self._wait()

    def step(self) -> list[int]:
        if self._unread is not None:
            with torch.inference_mode():
                self._forward(self._unread)
        if self._logits is None:
            raise CompressError("An engine has to read a prompt before it can write.")
        self._unread = self._logits[:, -1].argmax(-1, keepdim=True)
        tokens: list[int] = self._unread[:, 0].tolist()  # waits for the device
        return tokens

    def _forward(self, ids: Tensor) -> None:
        """Reads ids [rows, n], and keeps the cache and the last logits."""
        name = "decoder_input_ids" if "encoder_outputs" in self._given else "input_ids"
        found = self.model(**{name: ids}, **self._given, **self._last, use_cache=True)
        self._given |= {cache: getattr(found, cache) for cache in CACHES if getattr(found, cache, None) is not None}
        if not set(CACHES) & set(self._given):
            raise CompressError(f"{type(self.model).__name__} gives no cache, so its speed of writing is not measured.")
        self._logits = found.logits

    def _empty(self) -> None:
        self._given, self._logits, self._unread = {}, None, None

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        self._empty()
        self.model = None

    def tokens_read(self, length: int) -> int:
        return int(patches_of(self.model.config)) if self.images else length

    def resident_bytes(self) -> int | None:
        return resident_weights(self.model)

    def cache_bytes(self) -> int | None:
        held = [self._given[name] for name in CACHES if name in self._given]
        if not held:
            return None
        # By storage: a tensor that is a view holds all that it is a view of, and two views of one hold it once.
        storages = (tensor.untyped_storage() for tensor in tensors_in(held[0]))
        return sum({storage.data_ptr(): int(storage.nbytes()) for storage in storages}.values())


def bytes_read(model: Any) -> int:
    """Bytes of weights that a decode step at batch 1 reads: all that the model holds, packed ones as they are packed.

    Of an embedding only a row is read, so its table counts only where it is the head as well (tied). Of experts of
    which each token uses a few, that share counts. What has no layer (rotary tables) is small, and counted.
    """
    config = model.config.get_text_config()
    used, experts = _number(config, "num_experts_per_tok"), _number(config, "num_experts", "num_local_experts")
    share = min(1.0, used / experts) if used and experts else 1.0
    tables = [module for module in model.modules() if isinstance(module, (nn.Embedding, QuantEmbedding))]
    heads = {id(tensor) for tensor in _own(model.get_output_embeddings())} if model.can_generate() else set()
    seen = {id(tensor) for table in tables for tensor in _own(table)} - heads
    total = 0.0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            total += tensor.numel() * tensor.element_size() * (share if ".experts" in name else 1)
    return round(total)


def _own(module: nn.Module | None) -> list[Tensor]:
    """A layer's tensors; of a head that runs from a packed embedding, the embedding's."""
    owners = [] if module is None else [module, *([module.__dict__["table"]] if isinstance(module, TiedHead) else [])]
    return [tensor for owner in owners for tensor in (*owner.parameters(), *owner.buffers())]


def _number(config: Any, *names: str) -> int | None:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)
