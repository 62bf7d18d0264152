"""What models are called with, where that is more than the ids of one text."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig


def with_decoder(batch: dict[str, torch.Tensor], config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """What an encoder-decoder is called with where there is one text: its decoder is to write the text that its encoder
    reads, so it is given that text one place later, behind the token it starts with. Padding stands on the right, so
    the mask is the same. Others are called with the batch as it is."""
    if not config.is_encoder_decoder or "decoder_input_ids" in batch:
        return batch
    ids = batch["input_ids"]
    start = getattr(config, "decoder_start_token_id", None)
    start = config.pad_token_id if start is None else start
    later = torch.cat([ids.new_full((len(ids), 1), start or 0), ids[:, :-1]], dim=1)
    mask = {"decoder_attention_mask": batch["attention_mask"]} if "attention_mask" in batch else {}
    return {**batch, "decoder_input_ids": later, **mask}


def forward_inputs(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Arguments of a forward whose speed or memory is measured: the ids [1, length], or an empty image in their place
    for a model that reads images."""
    from compress.images import blank_image, reads_images

    if reads_images(model.config):
        return {"pixel_values": blank_image(model.config).to(ids.device)}
    return with_decoder({"input_ids": ids}, model.config)
