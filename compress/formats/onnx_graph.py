"""The graph of a decoder in ONNX, of the operators that ONNX Runtime runs fast, as ONNX Runtime GenAI calls it.

    ids -> embedding -> [norm -> attention -> norm -> gated MLP] x layers -> norm -> head -> logits

Operators of the domain com.microsoft are what counts: `MatMulNBits` multiplies with packed codes, `GroupQueryAttention`
rotates, attends and keeps keys and values, `SkipSimplifiedLayerNormalization` adds and norms at once. What goes between
them is float32. Weights are named as in the state dict and are not in the graph: `compress.formats.onnx` places them in
the file beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from onnx import GraphProto, ModelProto, TensorProto, helper
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from compress.checkpoint import TensorSpec
from compress.ends import find_ends
from compress.formats.onnx_blocks import block_count, block_size, codes_name
from compress.maths.grid import QuantSpec

if TYPE_CHECKING:
    from onnx import NodeProto, ValueInfoProto

MICROSOFT = "com.microsoft"
OPSET, MICROSOFT_OPSET, IR_VERSION = 21, 1, 10
#: Architectures whose blocks are those below, by their `model_type`.
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
#: Kinds of rotary tables that do not change with the length of the text.
ROTATIONS = ("default", "linear", "llama3", "yarn")
ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu")


def refuses_decoder(config: PretrainedConfig, architecture: str) -> str | None:
    """One sentence on why the graph cannot be made for a model of this config, or None."""
    if FAMILIES.get(config.model_type) != architecture:
        return f"onnx is written for {', '.join(FAMILIES.values())}, and the model is a {architecture}."
    for rotation in _rotations(config).values():
        kind, part = rotation.get("rope_type", "default"), rotation.get("partial_rotary_factor", 1.0)
        if kind not in ROTATIONS:
            return f"onnx holds rotary positions of the kinds {', '.join(ROTATIONS)}, and the model's are {kind}."
        if part != 1.0:
            return f"onnx holds rotary positions of whole heads, and the model's are of the part {part:g}."
    if (act := _activation(config)) not in ACTIVATIONS:
        return f"onnx holds MLPs with {', '.join(ACTIVATIONS)}, and the model's have {act}."
    odd = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")
    if found := [key for key in odd if getattr(config, key, None)]:
        return f"onnx does not hold what {found[0]} in the model's config asks for."
    return None


def _rotations(config: PretrainedConfig) -> dict[str, dict[str, Any]]:
    """The parameters of rotary positions by the type of layer; "" where all layers have the same."""
    found = getattr(config, "rope_parameters", None) or {}
    if found and all(isinstance(value, dict) for value in found.values()):
        return dict(found)
    return {"": dict(found)}


def _activation(config: PretrainedConfig) -> str:
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


class Decoder:
    """The graph of `model` (on the meta device) with the layers in `grids` packed. `build` gives it without weights.

    `rotary`: after `build`, cos and sin tables float32 [context, head_size / 2] by their names in the graph.
    """

    def __init__(self, model: PreTrainedModel, grids: Mapping[str, QuantSpec], accuracy_level: int):
        self.model, self.grids, self.accuracy_level = model, grids, accuracy_level
        self.config = model.config
        self.ends = find_ends(model)
        self.heads = int(self.config.num_attention_heads)
        self.kv_heads = int(getattr(self.config, "num_key_value_heads", None) or self.heads)
        self.head_size = int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.heads)
        self.layers = int(self.config.num_hidden_layers)
        self.context = int(self.config.max_position_embeddings)
        #: The attention itself rotates only heads of such sizes; before others there is an operator for it.
        self.fused_rotary = self.head_size % 16 == 0
        #: Added to the weights of norms: Gemma stores them less one.
        self.norm_offset = 1.0 if self.config.model_type.startswith("gemma") else 0.0
        self.rotary: dict[str, torch.Tensor] = {}
        self._nodes: list[NodeProto] = []
        self._constants: dict[str, TensorProto] = {}
        self._count = 0

    def build(self) -> ModelProto:
        """The model; its weights are named as inputs of nodes, and have to be added as initializers."""
        hidden = self._embedding("input_ids")
        lengths, total = self._lengths("attention_mask")
        added: str | None = None
        for index in range(self.layers):
            hidden, added = self._block(index, hidden, added, lengths, total)
        normed, _ = self._norm("model.norm", hidden, added)
        self._linear(normed, self.ends.head or "lm_head", output="logits")
        graph = helper.make_graph(self._nodes, "decoder", self._inputs(), self._outputs(), [*self._constants.values()])
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, MICROSOFT_OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="compress")

    def table_specs(self) -> list[TensorSpec]:
        """The rotary tables that `build` makes."""
        kinds = {self._rotation(index) for index in range(self.layers)}
        shape = (self.context, self.head_size // 2)
        return [TensorSpec(name, torch.float32, shape) for kind in sorted(kinds) for name in _table_names(kind)]

    def place(self, graph: GraphProto, name: str, tensor: torch.Tensor, where: tuple[str, int, int]) -> None:
        """Adds a weight that lies in a file: `where` is (file, first byte, bytes)."""
        kind = TensorProto.UINT8 if tensor.dtype == torch.uint8 else TensorProto.FLOAT
        weight = TensorProto(name=name, data_type=kind, dims=tensor.shape, data_location=TensorProto.EXTERNAL)
        for key, value in zip(("location", "offset", "length"), where, strict=True):
            weight.external_data.add(key=key, value=str(value))
        graph.initializer.append(weight)

    def _block(self, index: int, hidden: str, added: str | None, lengths: str, total: str) -> tuple[str, str]:
        """One block: what came in, with what is still to be added to it -> the same after it."""
        prefix = f"model.layers.{index}"
        block = self.model.get_submodule(prefix)
        normed, hidden = self._norm(f"{prefix}.input_layernorm", hidden, added)
        added = self._attention(index, normed, lengths, total)
        second = f"{prefix}.post_attention_layernorm"
        if hasattr(block, "pre_feedforward_layernorm"):  # Gemma norms what is added as well
            added, _ = self._norm(second, added)
            second = f"{prefix}.pre_feedforward_layernorm"
        normed, hidden = self._norm(second, hidden, added)
        added = self._mlp(f"{prefix}.mlp", normed)
        if hasattr(block, "post_feedforward_layernorm"):
            added, _ = self._norm(f"{prefix}.post_feedforward_layernorm", added)
        return hidden, added

    def _attention(self, index: int, x: str, lengths: str, total: str) -> str:
        prefix = f"model.layers.{index}.self_attn"
        attention = self.model.get_submodule(prefix)
        query, key, value = (self._linear(x, f"{prefix}.{name}_proj") for name in "qkv")
        if hasattr(attention, "q_norm"):
            query, key = self._head_norm(f"{prefix}.q_norm", query), self._head_norm(f"{prefix}.k_norm", key)
        tables = self._tables(index)
        if not self.fused_rotary:
            query, key = self._rotated(query, self.heads, tables), self._rotated(key, self.kv_heads, tables)
        past = [f"past_key_values.{index}.{part}" for part in ("key", "value")]
        present = [f"present.{index}.{part}" for part in ("key", "value")]
        attended, *_ = self._op(
            "GroupQueryAttention",
            [query, key, value, *past, lengths, total, *(tables if self.fused_rotary else ())],
            ["", *present],
            MICROSOFT,
            num_heads=self.heads,
            kv_num_heads=self.kv_heads,
            scale=float(attention.scaling),
            do_rotary=int(self.fused_rotary),
            local_window_size=self._window(index),
        )
        return self._linear(attended, f"{prefix}.o_proj")

    def _head_norm(self, name: str, x: str) -> str:
        """The norm of each head of x [batch, length, heads x size]."""
        (heads,) = self._op("Reshape", [x, self._constant("heads", [0, 0, -1, self.head_size])])
        normed, _ = self._norm(name, heads)
        return self._op("Reshape", [normed, self._constant("flat", [0, 0, -1])])[0]

    def _rotated(self, x: str, heads: int, tables: tuple[str, str]) -> str:
        inputs = [x, "position_ids", *tables]
        options: dict[str, Any] = {"num_heads": heads, "rotary_embedding_dim": self.head_size}
        return self._op("RotaryEmbedding", inputs, domain=MICROSOFT, **options)[0]

    def _mlp(self, prefix: str, x: str) -> str:
        gate, up = (self._linear(x, f"{prefix}.{name}_proj") for name in ("gate", "up"))
        kind = _activation(self.config)
        if kind == "silu":
            (gate,) = self._op("QuickGelu", [gate], domain=MICROSOFT, alpha=1.0)  # x sigmoid(1 x)
        else:
            (gate,) = self._op("Gelu", [gate], approximate="tanh" if kind == "gelu_pytorch_tanh" else "none")
        (product,) = self._op("Mul", [gate, up])
        return self._linear(product, f"{prefix}.down_proj")

    def _norm(self, name: str, x: str, added: str | None = None) -> tuple[str, str]:
        """(the norm of x + added, x + added)."""
        epsilon = _epsilon(self.model.get_submodule(name))
        if added is None:
            options: dict[str, Any] = {"axis": -1, "stash_type": 1, "epsilon": epsilon}
            return self._op("SimplifiedLayerNormalization", [x, f"{name}.weight"], **options)[0], x
        normed, _, _, total = self._op(
            "SkipSimplifiedLayerNormalization", [x, added, f"{name}.weight"], ["", None, None, ""], MICROSOFT,
            epsilon=epsilon,
        )  # fmt: skip
        return normed, total

    def _linear(self, x: str, name: str, output: str = "") -> str:
        """x W^T + b with the layer's weight, packed or not; a tied head's is the embedding's."""
        module = self.model.get_submodule(name)
        table = self.ends.embedding if self.ends.tied and name == self.ends.head else name
        spec = self.grids.get(table)
        bias = f"{name}.bias" if getattr(module, "bias", None) is not None else ""
        if spec is None:
            (y,) = self._op("FusedMatMul", [x, f"{table}.weight"], [output], MICROSOFT, transB=1)
            return self._op("Add", [y, bias])[0] if bias else y
        rows, columns = module.weight.shape
        inputs = [x, codes_name(table, spec), f"{table}.weight_scale"]
        inputs += ["" if spec.symmetric else f"{table}.weight_zero_point", "", bias]
        (y,) = self._op(
            "MatMulNBits", inputs, [output], MICROSOFT, K=int(columns), N=int(rows), bits=spec.bits,
            block_size=block_size(spec), accuracy_level=self.accuracy_level,
        )  # fmt: skip
        return y

    def _embedding(self, ids: str) -> str:
        name = self.ends.embedding
        module = self.model.get_submodule(name)
        spec = self.grids.get(name)
        if spec is None:
            (rows,) = self._op("Gather", [f"{name}.weight", ids], axis=0)
        else:
            count, columns = module.weight.shape
            width = block_count(spec, columns) * block_size(spec)
            shape = self._constant("embedding_shape", [int(count), width * spec.bits // 8])
            (table,) = self._op("Reshape", [codes_name(name, spec), shape])
            inputs = [table, ids, f"{name}.weight_scale"] + ([] if spec.symmetric else [f"{name}.weight_zero_point"])
            (rows,) = self._op(
                "GatherBlockQuantized", inputs, domain=MICROSOFT, bits=spec.bits, block_size=block_size(spec),
                gather_axis=0, quantize_axis=1,
            )  # fmt: skip
            if width != columns:
                ends = [self._constant(f"embedding_{k}", [v]) for k, v in (("from", 0), ("to", columns), ("axis", -1))]
                (rows,) = self._op("Slice", [rows, *ends])
        factor = getattr(module, "embed_scale", None)
        if factor is not None:
            self._constants["embedding_factor"] = helper.make_tensor(
                "embedding_factor", TensorProto.FLOAT, [], [float(factor)]
            )
            (rows,) = self._op("Mul", [rows, "embedding_factor"])
        return rows

    def _lengths(self, mask: str) -> tuple[str, str]:
        """Of an attention mask [batch, total]: the place of each row's last token, int32 [batch], and int32 total."""
        one = self._constant("one", [1])
        (counts,) = self._op("ReduceSum", [mask, one], keepdims=0)
        (last,) = self._op("Sub", [counts, one])
        (shape,) = self._op("Shape", [mask])
        self._constants["second"] = helper.make_tensor("second", TensorProto.INT64, [], [1])
        (total,) = self._op("Gather", [shape, "second"], axis=0)
        lengths, width = (self._op("Cast", [value], to=TensorProto.INT32)[0] for value in (last, total))
        return lengths, width

    def _tables(self, index: int) -> tuple[str, str]:
        """The names of the rotary tables of a layer, made at their first use by the model's own module."""
        kind = self._rotation(index)
        names = _table_names(kind)
        if names[0] not in self.rotary:
            x, places = torch.zeros(1), torch.arange(self.context)[None]
            found = self.model.model.rotary_emb(x, places, *([kind] if kind else []))
            for name, table in zip(names, found, strict=True):
                self.rotary[name] = table[0, :, : self.head_size // 2].float().contiguous()
        return names

    def _rotation(self, index: int) -> str:
        """The type of a layer, where each type has rotary positions of its own; else ""."""
        kinds = getattr(self.config, "layer_types", None)
        return "" if "" in _rotations(self.config) or not kinds else str(kinds[index])

    def _window(self, index: int) -> int:
        """Tokens that a layer looks back on, itself one of them; -1: all."""
        window = getattr(self.model.get_submodule(f"model.layers.{index}.self_attn"), "sliding_window", None)
        if window is None and self.config.model_type == "mistral":
            window = getattr(self.config, "sliding_window", None)
        return -1 if window is None else int(window)

    def _inputs(self) -> list[ValueInfoProto]:
        found = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"]),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
        ]
        if not self.fused_rotary:
            found.append(helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch", "length"]))
        return found + self._caches("past_key_values", "past")

    def _outputs(self) -> list[ValueInfoProto]:
        rows = int(self.model.get_submodule(self.ends.head or "lm_head").weight.shape[0])
        found = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length", rows])]
        return found + self._caches("present", "total")

    def _caches(self, prefix: str, length: str) -> list[ValueInfoProto]:
        shape: list[str | int | None] = ["batch", self.kv_heads, length, self.head_size]
        return [
            helper.make_tensor_value_info(f"{prefix}.{index}.{part}", TensorProto.FLOAT, shape)
            for index in range(self.layers)
            for part in ("key", "value")
        ]

    def _constant(self, name: str, values: list[int]) -> str:
        self._constants[name] = helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
        return name

    def _op(
        self, kind: str, inputs: list[str], outputs: list[str | None] | None = None, domain: str = "", **options: Any
    ) -> list[str]:
        """Adds a node. `outputs`: "" gets a name, None is left out; the names come back."""
        self._count += 1
        stem = f"{kind}.{self._count}"
        names = [
            "" if output is None else output or (f"{stem}.{place}" if place else stem)
            for place, output in enumerate(outputs or [""])
        ]
        while inputs and not inputs[-1]:
            inputs = inputs[:-1]
        self._nodes.append(helper.make_node(kind, inputs, names, name=stem, domain=domain, **options))
        return names


def _table_names(kind: str) -> tuple[str, str]:
    return f"rotary_cos{kind and '.' + kind}", f"rotary_sin{kind and '.' + kind}"


def _epsilon(norm: nn.Module) -> float:
    return float(getattr(norm, "variance_epsilon", None) or norm.eps)
