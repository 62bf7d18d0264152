"""What llama.cpp has to be told of each family: metadata, names of tensors, and how some tensors are laid out there.

Keys and their meaning: the GGUF specification (ggml-org/ggml, docs/gguf.md). Names of tensors are looked up in the
`gguf` package, llama.cpp's own table. What differs from transformers:

- Llama and Mistral: llama.cpp turns neighbouring elements of a head by one angle, transformers element i and i + half
  a head. The rows of q and k are reordered to fit; whole rows, so blocks stay as they are.
- Gemma 3 multiplies by `1 + weight` in its norms; the sum is stored. It divides scores by the root of
  `query_pre_attn_scalar`, llama.cpp by that of the head's size: where they differ, q's norm makes up for it.
- Llama 3's scaled rotary frequencies are stored as the factors that divide them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from compress.formats.base import Contents

#: Class of the model -> llama.cpp's name of the architecture.
FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3",
}
#: The activation that llama.cpp computes for each architecture.
_ACTIVATIONS = {"llama": "silu", "qwen3": "silu", "gemma3": "gelu_pytorch_tanh"}
#: llama.cpp's llama knows no sliding window: a file is good for as many tokens as the window has, at least so many.
_LEAST_WINDOW = 256
#: Of six layers of Gemma 3, the last sees all of the text; llama.cpp takes that for granted where nothing is said.
_PERIOD = 6
_SCALINGS = ("default", "linear", "llama3", "yarn")
_OWN_FACTORS = ("attention_factor", "mscale", "mscale_all_dim")


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding of the layers that see all of the text, and of those with a window (Gemma 3)."""

    scaling: dict[str, Any]
    base: float
    window_base: float | None

    @classmethod
    def of(cls, config: PretrainedConfig) -> Rotary:
        """From `rope_parameters`, which are one mapping or one for each type of layer."""
        found = dict(getattr(config, "rope_parameters", None) or {})
        window = found.get("sliding_attention")
        full = dict(found.get("full_attention", found))
        base = float(full.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)
        return cls(full, base, None if window is None else float(window["rope_theta"]))

    @property
    def kind(self) -> str:
        return str(self.scaling.get("rope_type") or "default")


def refuses_family(contents: Contents) -> str | None:
    """Why llama.cpp would not compute what this model does, from its config and its tensors' names; or None."""
    config, name = contents.config, contents.architecture
    arch = FAMILIES.get(name)
    if arch is None:
        return f"gguf holds {', '.join(FAMILIES)}, and this model is a {name}."
    act = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    rotary = Rotary.of(config)
    window = getattr(config, "sliding_window", None) if arch == "llama" else None
    trouble = None
    if act != _ACTIVATIONS[arch]:
        trouble = f"its activation is {act}, and llama.cpp computes {_ACTIVATIONS[arch]}"
    elif rotary.kind not in _SCALINGS:
        trouble = f"its rotary embedding is scaled by {rotary.kind}; llama.cpp is told of {', '.join(_SCALINGS)}"
    elif rotary.kind == "yarn" and any(rotary.scaling.get(key) is not None for key in _OWN_FACTORS):
        trouble = "its rotary embedding has a factor of its own, where llama.cpp computes YaRN's"
    elif float(rotary.scaling.get("partial_rotary_factor") or 1.0) != 1.0:
        trouble = "only a part of each head is rotated"
    elif window is not None and window < min(_LEAST_WINDOW, config.max_position_embeddings):
        trouble = f"its sliding window of {window} tokens is not one of llama.cpp's {arch}"
    elif getattr(config, "attn_logit_softcapping", None) or getattr(config, "use_bidirectional_attention", None):
        trouble = "its attention is not that of a language model of Gemma 3"
    elif "sliding_attention" in (getattr(config, "layer_types", None) or []) and arch != "gemma3":
        trouble = "some of its layers have a sliding window"
    if trouble is None:
        unknown = [spec.name for spec in contents.tensors if not _known(arch, spec.name)]
        trouble = f"llama.cpp's {arch} has no place for {unknown[0]}" if unknown else None
    return None if trouble is None else f"gguf cannot hold this {name}: {trouble}."


def _known(arch: str, name: str) -> bool:
    """Whether the tensor is one of the architecture's. Of biases, llama.cpp reads those of its llama alone."""
    return name.startswith(("model.", "lm_head.")) and (arch == "llama" or not name.endswith(".bias"))


def metadata(contents: Contents, writer: Any) -> None:
    """Tells a `gguf.GGUFWriter` the shape of the model."""
    import gguf

    config, arch = contents.config, FAMILIES[contents.architecture]
    head = _head_size(config)
    context = int(config.max_position_embeddings)
    if arch == "llama" and getattr(config, "sliding_window", None):
        context = min(context, int(config.sliding_window))
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rotary = Rotary.of(config)
    writer.add_rope_freq_base(rotary.base)
    if rotary.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rotary.kind))
        writer.add_rope_scaling_factor(float(rotary.scaling["factor"]))
    if rotary.kind == "yarn":
        _yarn(rotary.scaling, context, writer)
    if arch == "gemma3":
        _gemma(config, rotary, writer)


def _yarn(scaling: dict[str, Any], context: int, writer: Any) -> None:
    writer.add_rope_scaling_orig_ctx_len(int(scaling.get("original_max_position_embeddings") or context))
    for key, add in (
        ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
        ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
    ):
        if scaling.get(key) is not None:
            add(float(scaling[key]))


def _gemma(config: PretrainedConfig, rotary: Rotary, writer: Any) -> None:
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(float(config.final_logit_softcapping))
    windows = [kind == "sliding_attention" for kind in config.layer_types]
    if not any(windows):
        return
    writer.add_sliding_window(int(config.sliding_window))
    if rotary.window_base is not None:
        writer.add_rope_freq_base_swa(rotary.window_base)
    if windows != [index % _PERIOD < _PERIOD - 1 for index in range(len(windows))]:
        writer.add_sliding_window_pattern(windows)


def added_tensors(contents: Contents) -> dict[str, Tensor]:
    """Tensors of llama.cpp that transformers computes from the config: float32, by their names there."""
    rotary = Rotary.of(contents.config)
    if rotary.kind != "llama3":
        return {}
    return {"rope_freqs.weight": llama3_factors(_head_size(contents.config), rotary.base, rotary.scaling)}


def llama3_factors(head: int, base: float, scaling: dict[str, Any]) -> Tensor:
    """What divides each rotary frequency, float32 `[head / 2]`: 1 for short waves, `factor` for long ones, and between
    the two, by how often a wave fits the original context, a mean of the frequencies' own.

    >>> scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    >>> llama3_factors(4, 10000.0, {**scaling, "original_max_position_embeddings": 64}).tolist()
    [1.0, 8.0]
    """
    factor = float(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    context = int(scaling["original_max_position_embeddings"])
    frequency = base ** -(torch.arange(0, head, 2, dtype=torch.float64) / head)
    waves = context * frequency / (2 * math.pi)  # that fit the original context
    share = ((waves - low) / (high - low)).clamp(0, 1)
    return (1 / (share + (1 - share) / factor)).to(torch.float32)


def place_of(contents: Contents) -> Callable[[str], str]:
    """From a tensor's name in the model to its name in the file."""
    import gguf

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == FAMILIES[contents.architecture])
    names = gguf.get_tensor_name_map(arch, contents.config.num_hidden_layers)

    def place(name: str) -> str:
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        return str(found)

    return place


def rows_of(contents: Contents, name: str) -> Tensor | None:
    """The order in which a tensor's rows are stored (int64), or None for the one that they have."""
    config = contents.config
    if FAMILIES[contents.architecture] != "llama":
        return None
    layer = name.rpartition(".")[0]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(layer.rpartition(".")[2])
    if heads is None:
        return None
    return torch.arange(heads * _head_size(config)).view(heads, 2, -1).transpose(1, 2).flatten()


def norm_values(contents: Contents, name: str, weight: Tensor) -> Tensor:
    """A tensor of one dimension, float32, as llama.cpp multiplies by it."""
    config, weight = contents.config, weight.to(torch.float32)
    if FAMILIES[contents.architecture] != "gemma3" or not name.endswith("norm.weight"):
        return weight
    weight = weight + 1
    if not name.endswith("q_norm.weight"):
        return weight
    taken = config.hidden_size / config.num_attention_heads if config.num_hidden_layers == 62 else _head_size(config)
    ratio = taken / config.query_pre_attn_scalar
    return weight if ratio == 1 else weight * math.sqrt(ratio)


def _head_size(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
