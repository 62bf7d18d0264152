"""What int8 activations cost in quality, through the kernel that is timed.

    python benchmarks/activations.py [--model builtin:tiny] [--bits 4] [--group-size 64] [--windows 64] --name NAME

The model is rounded (gptq, 128 windows of calibration text), the head with it, and reads the evaluation text `--step`
tokens at a time on its cache, so that every product goes through the CPU kernel for few tokens (one: through whole
blocks): once with float activations, once with int8. KL is nats a token to the original, and to the float path. Writes
benchmarks/results/activations-NAME.json.
"""

from __future__ import annotations

import tempfile

import torch
from arguments import settings, write_result
from torch.nn import functional
from transformers import PreTrainedModel

import compress
from compress.data import token_windows
from compress.locating import locate
from compress.measure.environment import environment
from compress.measure.runtimes import load_plain, load_tokenizer
from compress.nn import cpu
from compress.nn.quant_linear import QuantLinear
from compress.recipe import DataEntry


@torch.inference_mode()
def read(model: PreTrainedModel, window: torch.Tensor, step: int) -> torch.Tensor:
    """Log-probabilities float64 [positions, vocabulary] of a window read `step` tokens at a time."""
    cache, parts = None, []
    for ids in window[None].split(step, dim=1):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits[0].double())
    return torch.cat(parts).log_softmax(-1)


def kl(reference: torch.Tensor, found: torch.Tensor) -> float:
    return float(functional.kl_div(found, reference, log_target=True, reduction="batchmean"))


def main() -> None:
    options = settings(__doc__, model="builtin:tiny", bits=4, group_size=64, windows=64, length=128, step=16)
    if cpu.why_not_int8():
        raise SystemExit(f"int8 activations cannot be had here: {cpu.why_not_int8()}")
    model = locate(options.model)
    recipe = {
        "model": options.model, "benchmark": False,
        "passes": [{"gptq": {"bits": options.bits, "group_size": options.group_size, "head": options.bits}}],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        compress.run(compress.Recipe.from_dict({**recipe, "output": scratch}))
        original = load_plain(model)
        paths = {kind: compress.load(scratch, activations=kind) for kind in ("float", "int8")}
    entry = DataEntry(source=options.model, samples=options.windows, length=options.length)
    tokenizer = load_tokenizer(model)
    windows = token_windows(entry, "evaluation", tokenizer, options.length).tokens
    sums: dict[str, float] = dict.fromkeys(("original to float", "original to int8", "float to int8"), 0.0)
    for window in windows:
        first, plain, rounded = (read(each, window, options.step) for each in (original, paths["float"], paths["int8"]))
        for name, (a, b) in zip(sums, ((first, plain), (first, rounded), (plain, rounded)), strict=True):
            sums[name] += kl(a, b) / len(windows)
    layers = [layer for layer in paths["int8"].modules() if isinstance(layer, QuantLinear)]
    served = sum(cpu.why_not_int8(layer) is None for layer in layers)
    result = {
        "options": vars(options), "tokens": windows.numel(), "kl": sums,
        "layers": len(layers), "served in int8": served,
        "environment": environment(threads=torch.get_num_threads(), device="cpu"),
    }  # fmt: skip
    write_result(f"activations-{options.name}", result)
    print({key: result[key] for key in ("tokens", "kl", "layers", "served in int8")})


if __name__ == "__main__":
    main()
