"""kv_cache: keep the keys and values of past tokens in 4 or 8 bits while the model writes.

Liu et al.: "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", 2024, arXiv 2402.02750. The method is in
`compress.nn.quant_cache`. The pass changes no weight: it is recorded with the model, `compress.load` sees the record
and gives a model whose cache is packed, and any other program reads the folder as before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.nn.quant_cache import CacheSpec, packed_layers, use_packed_cache
from compress.passes.base import STATES, Context, Pass, PassResult

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from compress.model import ModelHandle


class KVCache(Pass):
    """Keep keys and values of past tokens in 4 or 8 bits while the model writes; no weight is changed."""

    name: ClassVar[str] = "kv_cache"
    accepts: ClassVar[frozenset[str]] = frozenset(STATES)
    leaves: ClassVar[str] = "dense"
    changes_weights: ClassVar[bool] = False

    bits: Literal[4, 8] = Field(default=8, description="Bits of each key and value.")
    group_size: int = Field(
        default=32,
        ge=2,
        description="Keys: neighbouring tokens, values: neighbouring channels of a head (all, where it does not "
        "divide them), that share a scale.",
    )
    residual_length: int = Field(
        default=32, ge=0, description="The most recent tokens, at least so many, are kept as they are."
    )

    @property
    def spec(self) -> CacheSpec:
        return CacheSpec(self.bits, self.group_size, self.residual_length)

    def refuses(self, model: PreTrainedModel) -> str | None:
        if model.config.is_encoder_decoder or not model.can_generate():
            return f"{type(model).__name__} does not write text token by token from a cache of its own."
        packed, layers = packed_layers(model.config)
        if not packed:
            return (
                f"each of the {layers} layers of {type(model).__name__} keeps a window of tokens or another state, and "
                "only the cache of layers that look back at all tokens is packed."
            )
        return None

    def run(self, model: ModelHandle, context: Context) -> PassResult:
        use_packed_cache(model.model, self.spec)
        return PassResult(model, [], 0.0, self.measurements(model.config, model.dtype.itemsize))

    def measurements(self, config: PretrainedConfig, itemsize: int) -> dict[str, Any]:
        """Bytes that a token adds to the cache of all packed layers, and added before, in a dtype of `itemsize` bytes.

        None where the config does not say what a layer keeps of a token (as with latent attention).
        """
        text = config.get_text_config(decoder=True)
        packed, layers = packed_layers(config)
        before = after = None
        if getattr(text, "kv_lora_rank", None) is None:
            heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
            width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
            before = packed * 2 * heads * width * itemsize
            after = packed * self.spec.bytes_per_token(heads, width)
        return {
            "packed_layers": packed,
            "layers": layers,
            "cache_bytes_per_token": after,
            "cache_bytes_per_token_before": before,
        }
