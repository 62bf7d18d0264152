"""Decode and prefill of packed weights in transformers, interleaved with bfloat16 and with other packed formats.

    python benchmarks/decode.py [--shapes 1b 135m] [--bits 4] [--head-bits 4] [--rounds 3] [--prompt 32] [--new 64]
        [--prefill 512] [--systems bf16 prepack compress compress-int8 trellis trellis-int8 w8a8 bitsandbytes torchao
        llama.cpp onnxruntime] [--threads N] [--clock wall|cpu] --name NAME

Random weights of the shape (speed does not depend on what they are): Llama-3.2-1B's or SmolLM-135M's, head and
embedding tied in bfloat16 systems and stored apart where the head is packed. Groups of 128, or 64 where 128 does not
divide. Batch 1, greedy; a decode figure is the new tokens after the first over the time they take. All systems are
held at once, and take turns: A B C A B C. trellis has as many codes along a trellis. prepack is bfloat16 in oneDNN's
order; w8a8 has weights and inputs in int8, the head in bfloat16; bitsandbytes is NF4 of all linear layers but the
head, torchao its CPU layout of int4 (in the versions that have it, to 0.16), each as it comes. llama.cpp runs its own
Q4_0 of the model, head in Q6_K as it comes; onnxruntime (GenAI) an export of the packed model, whose graph and
operators are those of its own builder's int4. A system that is not installed is left out. The cpu clock counts the
processor's time, for machines that are busy with other work: with one thread, it says what the wall clock of a quiet
machine would, as far as memory is free.
Writes benchmarks/results/decode-NAME.json and .md.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from arguments import settings, write_result
from gguf_q4 import write_blocks
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from compress.formats.base import Contents
from compress.formats.folder import write_model_folder
from compress.formats.gguf import FILE
from compress.maths.grid import QuantSpec, eight_bit_spec
from compress.measure.engine import Engine
from compress.measure.environment import environment
from compress.measure.llama_cpp import LlamaCpp
from compress.measure.onnxruntime_engine import OnnxRuntime
from compress.nn import kernels
from compress.nn.cpu_step import use_block_steps
from compress.nn.prompt import use_quick_prompts
from compress.nn.quant_linear import QuantLinear
from compress.nn.running import run_as
from compress.recipe import Runtime
from compress.testing import byte_tokenizer

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
OWN = ["prepack", "compress", "compress-int8", "w8a8"]
SYSTEMS = ["bf16", *OWN, "bitsandbytes", "torchao", "llama.cpp", "onnxruntime"]
#: Only where they are asked for: the packed model's codes read along a trellis, the head's too.
TRELLIS = ["trellis", "trellis-int8"]
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 8192, "vocab_size": 128256,
    },
    "135m": {
        "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "intermediate_size": 1536, "vocab_size": 49152,
    },
}  # fmt: skip


def dense(shape: str) -> PreTrainedModel:
    """A model of the shape with random weights in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=True, dtype=torch.bfloat16)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    return model


def packed(model: PreTrainedModel, bits: int, head_bits: int, grid: str | None = None) -> PreTrainedModel:
    """A copy whose linear layers are packed (random codes), the head in `head_bits` (16: as it is)."""
    found = copy.deepcopy(model)
    head = found.get_output_embeddings()
    for name, layer in list(found.named_modules()):
        if not isinstance(layer, nn.Linear) or (layer is head and head_bits == 16):
            continue
        group = 128 if layer.in_features % 128 == 0 else 64
        spec = QuantSpec(head_bits if layer is head else bits, group, True, "bfloat16", grid=grid)
        new = QuantLinear(layer.in_features, layer.out_features, spec, dtype=torch.bfloat16)
        new.weight_packed.random_(-(2**31), 2**31 - 1)
        new.weight_scale.fill_(0.0003)
        new.exact = False
        found.set_submodule(name, new)
    return found


def stepping(model: PreTrainedModel, int8: bool) -> PreTrainedModel:
    """The packed model as `compress.load` sets it to run."""
    run_as(model, Runtime(activations="int8" if int8 else "float"), asked=True)
    use_block_steps(model)
    use_quick_prompts(model)
    return model


def prepacked(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose dense layers are in oneDNN's order."""
    found = copy.deepcopy(model)
    run_as(found, Runtime(prepack=True), asked=True)
    return found


def eight_bits(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with weights and inputs of the blocks' layers in int8 (random codes), as `smoothquant` leaves it."""
    found = copy.deepcopy(model)
    for name, layer in list(found.model.layers.named_modules()):
        if isinstance(layer, nn.Linear):
            spec = eight_bit_spec(torch.bfloat16, "int8", True)
            new = QuantLinear(layer.in_features, layer.out_features, spec, dtype=torch.bfloat16)
            new._buffers["weight"].random_(-128, 127)
            new.weight_scale.fill_(0.0003)
            new.exact = False
            found.model.layers.set_submodule(name, new)
    use_quick_prompts(found)
    return found


def with_bitsandbytes(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in NF4, the head left as it is, as transformers makes it."""
    import bitsandbytes

    found = copy.deepcopy(model)
    head = found.get_output_embeddings()
    for name, layer in list(found.named_modules()):
        if isinstance(layer, nn.Linear) and layer is not head:
            new = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            new.load_state_dict({"weight": layer.weight.data})
            found.set_submodule(name, new.to("cpu"))
    return found.eval()  # in training it keeps to an order that its kernel for one row cannot read


def with_torchao(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in int4, groups of 64 or 128, the head left as it is."""
    from torchao.quantization import quantize_

    try:
        from torchao.prototype.int4_opaque_tensor import Int4WeightOnlyOpaqueTensorConfig as Config
    except ImportError:
        from torchao.dtypes import Int4CPULayout
        from torchao.quantization import Int4WeightOnlyConfig

        def Config(group_size: int) -> Any:
            return Int4WeightOnlyConfig(group_size=group_size, layout=Int4CPULayout(), version=1)

    found = copy.deepcopy(model)
    group = 128 if found.config.hidden_size % 128 == 0 else 64
    quantize_(found.model, Config(group_size=group))
    return found


def with_llama_cpp(model: PreTrainedModel, threads: int) -> Engine:
    """llama.cpp on its own Q4_0 of the model."""
    if reason := LlamaCpp().missing():
        raise ImportError(reason)
    import llama_cpp

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "dense"
        write_model_folder(folder, Contents.of_model(model, byte_tokenizer()), "gguf")
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, threads
        blocks = Path(place) / "packed" / FILE
        write_blocks(folder / FILE, blocks, params)
        return LlamaCpp().open(blocks.parent, threads=threads, device="cpu")


def with_onnxruntime(model: PreTrainedModel, threads: int) -> Engine:
    """ONNX Runtime GenAI on an export of the packed model."""
    if reason := OnnxRuntime().missing():
        raise ImportError(reason)
    with tempfile.TemporaryDirectory() as place:
        folder = write_model_folder(Path(place) / "onnx", Contents.of_model(model), "onnx")
        return OnnxRuntime().open(folder, threads=threads, device="cpu")


@torch.inference_mode()
def decode(model: PreTrainedModel | Engine, prompt: int, new: int, clock: Clock = time.perf_counter) -> float:
    """Tokens a second after the first new one."""
    ids = torch.arange(prompt).unsqueeze(0) + 5
    if isinstance(model, Engine):
        model.prefill(ids.tolist())
        model.step()
        started = clock()
        for _ in range(new - 1):
            model.step()
        return (new - 1) / (clock() - started)
    options = {"do_sample": False, "pad_token_id": 0}

    def seconds(count: int) -> float:
        started = clock()
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)
        return clock() - started

    first = seconds(1)
    return (new - 1) / (seconds(new) - first)


@torch.inference_mode()
def prefill(model: PreTrainedModel | Engine, length: int, clock: Clock = time.perf_counter) -> float:
    """Tokens a second, last logits only."""
    ids = torch.arange(length).unsqueeze(0) % 1000
    started = clock()
    if isinstance(model, Engine):
        model.prefill(ids.tolist())
    else:
        model(input_ids=ids, logits_to_keep=1, use_cache=True)
    return length / (clock() - started)


def bandwidth() -> float:
    """Bytes a second at which this machine reads memory: the best of a few sums over 400 MB."""
    values = torch.ones(100_000_000)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        values.sum()
        best = max(best, values.nbytes / (time.perf_counter() - started))
    return best


def measured(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """Median decode and prefill of every system on one shape, and their ratios to bfloat16 within each round."""
    base = dense(shape)
    threads = torch.get_num_threads()
    makers: dict[str, Callable[[], PreTrainedModel | Engine]] = {
        "bf16": lambda: base,
        "prepack": lambda: prepacked(base),
        "compress": lambda: stepping(packed(base, options.bits, options.head_bits), int8=False),
        "compress-int8": lambda: stepping(packed(base, options.bits, options.head_bits), int8=True),
        "trellis": lambda: stepping(packed(base, options.bits, options.head_bits, "trellis"), int8=False),
        "trellis-int8": lambda: stepping(packed(base, options.bits, options.head_bits, "trellis"), int8=True),
        "w8a8": lambda: eight_bits(base),
        "bitsandbytes": lambda: with_bitsandbytes(base),
        "torchao": lambda: with_torchao(base),
        "llama.cpp": lambda: with_llama_cpp(base, threads),
        "onnxruntime": lambda: with_onnxruntime(packed(base, options.bits, options.head_bits), threads),
    }
    systems = {}
    for name in options.systems:
        try:
            systems[name] = makers[name]()
        except ImportError as error:
            print(f"{name} is left out: {error}")
    if "compress" in systems:
        layer = systems["compress"].model.layers[0].mlp.up_proj
        steps = sum("forward" in module.__dict__ for module in systems["compress"].modules())
        name = kernels.choose(layer, torch.zeros(1, layer.in_features, dtype=torch.bfloat16)).name
        print("kernel:", name, "- blocks in one call:", steps)
    decoded: dict[str, list[float]] = {name: [] for name in systems}
    filled: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(options.rounds + 1):  # the first round warms up
        for name, model in systems.items():
            clock = CLOCKS[options.clock]
            figures = decode(model, options.prompt, options.new, clock), prefill(model, options.prefill, clock)
            if number:
                decoded[name].append(figures[0])
                filled[name].append(figures[1])
                print(shape, name, *(f"{figure:.1f}" for figure in figures), flush=True)
    rows = {
        name: {
            "decode": median(decoded[name]), "prefill": median(filled[name]),
            "decode_ratio": median(a / b for a, b in zip(decoded[name], decoded["bf16"], strict=True)),
            "prefill_ratio": median(a / b for a, b in zip(filled[name], filled["bf16"], strict=True)),
            "rounds": {"decode": decoded[name], "prefill": filled[name]},
        }
        for name in systems
    }  # fmt: skip
    return {"shape": SHAPES[shape], "rows": rows, "bytes_per_second": bandwidth()}


def markdown(found: dict[str, Any]) -> str:
    lines = ["| shape | system | decode tok/s | x bf16 | prefill tok/s | x bf16 |", "|---|" + "---|" * 5]
    for shape, result in found.items():
        for name, row in result["rows"].items():
            cells = [row["decode"], row["decode_ratio"], row["prefill"], row["prefill_ratio"]]
            lines.append(f"| {shape} | {name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    options = settings(
        __doc__, shapes={"nargs": "+", "default": list(SHAPES), "choices": list(SHAPES)},
        systems={"nargs": "+", "default": SYSTEMS, "choices": [*SYSTEMS, *TRELLIS]}, threads={"type": int},
        clock={"default": "wall", "choices": list(CLOCKS)},
        bits=4, head_bits=4, rounds=3, prompt=32, new=64, prefill=512,
    )  # fmt: skip
    if options.threads:
        torch.set_num_threads(options.threads)
    found = {shape: measured(shape, options) for shape in options.shapes}
    told = {"command": "python benchmarks/decode.py ...", "options": vars(options)}
    around = environment(threads=torch.get_num_threads(), device="cpu")
    write_result(f"decode-{options.name}", {**told, "environment": around, "shapes": found}, markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    main()
