"""llama.cpp's k-quants with an importance matrix beside ours, at equal bytes of the blocks' linear layers.

    python benchmarks/k_quants.py MODEL --library FILE --data builtin:tiny | --calibration FILE --evaluation FILE
        --name NAME [--types Q4_K Q3_K Q2_K] [--methods gptq autoround] [--samples 400] [--tokens 3000000]

The k-quants are those of llama.cpp's own code, called in its shared library (`ggml_quantize_chunk`; --library is one
that exports it, such as the module of `pip install xllamacpp`), with the mean square of every input column over the
calibration windows as importance, which is what its imatrix holds. Every linear layer of the blocks gets the same type;
rows must be multiples of 256. Ours gets at most as many bytes, scales counted: `choice` says which grid. Everything
else is untouched on both sides; all models run dequantized in float32 over the same evaluation windows.

Writes benchmarks/results/k-quants-NAME.json and .md.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import compress
from compress.data import Windows
from compress.locating import locate
from compress.measure.likelihood import window_scores
from compress.model import ModelHandle
from compress.nn.quant_linear import QuantLinear
from compress.opening import open_model, read_tokenizer
from compress.preparation import cut_texts
from compress.recipe import Recipe

RESULTS = Path(__file__).parent / "results"


class KQuant(NamedTuple):
    """A type of llama.cpp: its number in ggml's table, bytes of 256 weights, and the grid of ours set against it, which
    takes no more."""

    number: int
    block_bytes: int
    bits: int
    group_size: int


K_QUANTS = {
    "Q4_K": KQuant(12, 144, 4, 32),
    "Q3_K": KQuant(11, 110, 3, 64),
    "Q2_K": KQuant(10, 84, 2, 32),
}


def k_quantized(library: ctypes.CDLL, kind: str, weight: Tensor, importance: Tensor) -> Tensor:
    """`weight` [rows, columns] float32 as the type holds it; `importance` [columns]."""
    rows, columns = weight.shape
    source = weight.detach().contiguous().float()
    packed = torch.zeros(rows * columns // 256 * K_QUANTS[kind].block_bytes, dtype=torch.uint8)
    result = torch.empty(rows, columns)
    matrix = importance.contiguous().float()

    def address(tensor: Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(tensor.data_ptr())

    library.ggml_quantize_init(ctypes.c_int(K_QUANTS[kind].number))
    call = library.ggml_quantize_chunk
    call.restype = ctypes.c_size_t
    written = call(
        ctypes.c_int(K_QUANTS[kind].number), address(source), address(packed), ctypes.c_int64(0),
        ctypes.c_int64(rows), ctypes.c_int64(columns), address(matrix),
    )  # fmt: skip
    if written != packed.numel():
        raise RuntimeError(f"{kind}: {written} bytes were written, {packed.numel()} expected.")
    getattr(library, f"dequantize_row_q{kind[1:]}")(address(packed), address(result), ctypes.c_int64(rows * columns))
    return result


def column_squares(model: PreTrainedModel, windows: Windows) -> dict[str, Tensor]:
    """Mean square of each input column of the blocks' linear layers, by layer name, over all windows."""
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            squares = args[0].float().square().flatten(0, -2).sum(0)
            sums[name] = sums.get(name, torch.zeros_like(squares)) + squares

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in linear_layers(model).items()]
    with torch.inference_mode():
        for part in windows.tokens.split(8):
            model(input_ids=part)
    for handle in handles:
        handle.remove()
    return {name: total / windows.tokens.numel() for name, total in sums.items()}


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The blocks' linear layers by their name in the model."""
    blocks = ModelHandle.wrap(model).block_list()
    return {f"{block.name}.{name}": layer.module for block in blocks for name, layer in block.layers().items()}


def ours(options: argparse.Namespace, method: str, kind: KQuant, texts: dict[str, Windows]) -> dict[str, Any]:
    """One of our methods on the grid that stands against a type: the model, the bytes, the seconds."""
    original = open_model(options.folder).model
    model = copy.deepcopy(original)
    grid = {"bits": kind.bits, "group_size": kind.group_size}
    started = time.monotonic()
    steps = [compress.GPTQ(**grid)] if method == "gptq" else [compress.AutoRound(**grid)]
    if method == "best":
        steps = compress.Quantize(preset="best", tokens=options.tokens, **grid).stands_for()
    for step in steps:
        step(
            model, calibration=texts["calibration"].tokens if step.takes_calibration else None,
            training=texts["training"].tokens if step.needs_training else None, original=original,
        )  # fmt: skip
    packed = [m for m in model.modules() if isinstance(m, QuantLinear)]
    stored = sum(m.weight_packed.nbytes + m.weight_scale.nbytes // m.weight_scale.element_size() * 2 for m in packed)
    return {"model": model, "bytes": stored, "seconds": time.monotonic() - started}


def theirs(original: PreTrainedModel, kind: str, library: Any, importance: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The model with every linear layer as the library's blocks have it, their bytes and the seconds it took."""
    found: dict[str, Any] = {"model": copy.deepcopy(original), "bytes": 0, "seconds": 0.0}
    started = time.monotonic()
    for name, layer in linear_layers(found["model"]).items():
        layer.weight.data = k_quantized(library, kind, layer.weight, importance[name])
        found["bytes"] += layer.weight.numel() // 256 * K_QUANTS[kind].block_bytes
    found["seconds"] = time.monotonic() - started
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--library", required=True)
    parser.add_argument("--data", help="a source for calibration, training and evaluation alike (builtin:tiny)")
    parser.add_argument("--calibration")
    parser.add_argument("--evaluation")
    parser.add_argument("--name", required=True)
    parser.add_argument("--types", nargs="+", default=list(K_QUANTS), choices=list(K_QUANTS))
    parser.add_argument("--methods", nargs="+", default=["gptq", "autoround"], choices=["gptq", "autoround", "best"])
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=3_000_000)
    options = parser.parse_args()
    calibration = str(Path(options.calibration).resolve()) if options.calibration else options.data
    evaluation = str(Path(options.evaluation).resolve()) if options.evaluation else options.data
    recipe = Recipe.from_dict(
        {
            "model": options.model, "passes": [{"gptq": {}}, {"llm_qat": {}}],
            "data": {"calibration": calibration, "training": calibration,
                     "evaluation": {"source": evaluation, "samples": options.samples}},
        }
    )  # fmt: skip
    options.folder = locate(recipe.model)
    original = open_model(options.folder).model
    texts = cut_texts(
        recipe.data, ["calibration", "training", "evaluation"], read_tokenizer(options.folder), original.config,
        Path.cwd(), 0, options.folder,
    )  # fmt: skip
    importance = column_squares(original, texts["calibration"])
    library = ctypes.CDLL(options.library)
    place = RESULTS / f"k-quants-{options.name}.json"
    rows: list[dict[str, Any]] = json.loads(place.read_text())["rows"] if place.exists() else []
    for kind in options.types:
        for method in ["k-quant", *options.methods]:
            if any((row["against"], row["method"]) == (kind, method) for row in rows):
                continue
            if method == "k-quant":
                found = theirs(original, kind, library, importance)
            else:
                found = ours(options, method, K_QUANTS[kind], texts)
            scores = window_scores(found["model"], texts["evaluation"].tokens, reference=original)
            tokens = float(scores.tokens.sum())
            assert scores.kl is not None
            assert scores.reference_nll is not None
            assert scores.top1 is not None
            rows.append({
                "against": kind, "method": method, "bytes": found["bytes"],
                "kl_divergence": float(scores.kl.sum()) / tokens,
                "log_perplexity_gap": float((scores.nll - scores.reference_nll).sum()) / tokens,
                "top1_agreement": float(scores.top1.sum()) / tokens, "seconds": found["seconds"],
            })  # fmt: skip
            place.write_text(
                json.dumps({"command": "python benchmarks/k_quants.py ...", "rows": rows}, indent=1) + "\n"
            )
            place.with_suffix(".md").write_text(markdown(rows))
            print(markdown(rows[-1:]).splitlines()[-1], flush=True)


def markdown(rows: list[dict[str, Any]]) -> str:
    """A line for each method, in the groups of what it stands against."""
    lines = ["| against | method | kB | KL | log-ppl gap | top-1 | seconds |", "|---|" + "---|" * 6]
    for row in rows:
        cells = [
            row["against"], row["method"], f"{row['bytes'] / 1e3:.0f}", f"{row['kl_divergence']:.5f}",
            f"{row['log_perplexity_gap']:.5f}", f"{row['top1_agreement']:.4f}", f"{row['seconds']:.0f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
