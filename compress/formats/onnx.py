"""ONNX, as ONNX Runtime GenAI opens it: a graph, the weights beside it, the tokenizer and genai_config.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.checkpoint import TensorSpec, atomic_write_text
from compress.formats.base import Contents, Format, foreign
from compress.maths import packing
from compress.maths.grid import QuantSpec

if TYPE_CHECKING:
    from compress.formats.onnx_graph import Decoder

MODEL, DATA, CONFIG = "model.onnx", "model.onnx.data", "genai_config.json"
#: Weights start at multiples of it, so that they can be mapped.
ALIGNMENT = 4096
#: Most tokens that GenAI makes room for where nobody says how many.
MAX_LENGTH = 4096


class Onnx(Format):
    """Our codes and scales in `MatMulNBits` of 4 or 8 bits; float32 for the rest."""

    name = "onnx"

    def refuses(self, dtype: torch.dtype, kinds: Mapping[str, str], specs: Mapping[str, QuantSpec]) -> str | None:
        from compress.formats.onnx_graph import refuses_grid

        reasons = (refuses_grid(spec, name) for name, spec in specs.items())
        return foreign(self.name, specs) or next((reason for reason in reasons if reason), None)

    def write(self, folder: Path, contents: Contents) -> None:
        import onnx

        from compress.formats.onnx_graph import Decoder, Settings, external

        decoder = Decoder(contents.skeleton, contents.quantization, Settings(int(os.environ.get("ACC", "1"))))
        model = decoder.build()
        with open(folder / DATA, "wb") as file:

            def place(name: str, array: Any) -> None:
                file.seek(-(-file.tell() // ALIGNMENT) * ALIGNMENT)
                start = file.tell()
                array.tofile(file)
                kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
                external(model.graph, name, kind, array.shape, (DATA, start, array.nbytes))

            for spec in contents.tensors:
                tensor = held(spec.name, contents, decoder)
                if tensor is not None:
                    place(spec.name, tensor.contiguous().numpy())
            for name, table in decoder.rotary.items():
                place(name, table.numpy())
        onnx.save_model(model, folder / MODEL)
        config = genai_config(contents, decoder)
        atomic_write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
        if contents.tokenizer is not None:
            contents.tokenizer.save_pretrained(str(folder))


def held(name: str, contents: Contents, decoder: Decoder) -> Tensor | None:
    """A tensor of the model as the graph takes it; None where it takes none of it."""
    from compress.formats.onnx_graph import block_size

    layer, _, last = name.rpartition(".")
    spec = contents.quantization.get(layer)
    if last == "weight_shape":
        return None
    tensor = contents.read(name)
    if spec is None or last == "bias":
        norm = last == "weight" and tensor.dim() == 1
        return tensor.float() + decoder.offset if norm else tensor.float()
    rows, columns = contents.skeleton.get_submodule(layer).weight.shape
    if last in ("weight_packed", "weight"):
        return blocks(tensor, spec, columns)
    if last == "weight_scale":
        return repeated(tensor.float(), spec, columns)
    zero = repeated(packing.unpack_rows(tensor, spec.bits, rows), spec, columns)
    return packed_bytes(zero, spec.bits)


def blocks(stored: Tensor, spec: QuantSpec, columns: int) -> Tensor:
    from compress.formats.onnx_graph import block_size

    size = block_size(spec)
    count = -(-columns // size)
    unsigned = stored.view(torch.uint8) if spec.stored == "packed" else (stored.to(torch.int16) + 128).to(torch.uint8)
    width = count * size * spec.bits // 8
    if unsigned.shape[1] < width:
        unsigned = torch.nn.functional.pad(unsigned, (0, width - unsigned.shape[1]))
    return unsigned[:, :width].reshape(len(unsigned), count, size * spec.bits // 8)


def repeated(groups: Tensor, spec: QuantSpec, columns: int) -> Tensor:
    from compress.formats.onnx_graph import block_size

    size = block_size(spec)
    each = -(-columns // size) if spec.group_size == -1 else spec.group_size // size
    return groups.repeat_interleave(each, dim=1)


def packed_bytes(codes: Tensor, bits: int) -> Tensor:
    """int8 [rows, n] -> uint8 [rows, ceil(n * bits / 8)]."""
    width = -(-codes.shape[1] * bits // 8)
    return packing.pack(codes.contiguous(), bits).view(torch.uint8)[:, :width]


def genai_config(contents: Contents, decoder: Decoder) -> dict[str, Any]:
    from compress.formats.onnx_graph import FAMILIES

    config = contents.config
    generation = contents.generation_config
    tokens = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(generation, key, None) if generation is not None else None
        tokens[key] = getattr(config, key, None) if value is None else value
    end = tokens["eos_token_id"]
    first = end[0] if isinstance(end, list) and end else end
    tokens["pad_token_id"] = first if tokens["pad_token_id"] is None else tokens["pad_token_id"]
    names = {
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            **({} if decoder.fused_rotary else {"position_ids": "position_ids"}),
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    return {
        "model": {
            **{key: value for key, value in tokens.items() if value is not None},
            "context_length": decoder.context,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": MODEL,
                "head_size": decoder.head_size,
                "hidden_size": int(config.hidden_size),
                **names,
                "num_attention_heads": decoder.heads,
                "num_hidden_layers": decoder.layers,
                "num_key_value_heads": decoder.kv_heads,
            },
            "type": FAMILIES[config.model_type],
            "vocab_size": int(config.vocab_size),
        },
        "search": {
            "do_sample": bool(getattr(generation, "do_sample", False)),
            "max_length": min(decoder.context, MAX_LENGTH),
            "past_present_share_buffer": True,
        },
    }
