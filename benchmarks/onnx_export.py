"""The ONNX export beside ONNX Runtime's own rounding: divergence at equal bytes, and decode speed in turns.

    python benchmarks/onnx_export.py MODEL --calibration FILE --evaluation FILE --name NAME [--grids 4:32 4:64]
        [--samples 100] [--rounds 7] [--new 64]
    python benchmarks/onnx_export.py 135m --calibration none --evaluation none --name 135m   (random weights: speed)

Both are one graph of the same bytes: the export of a model that `gptq` (or `rtn`) rounded here, and that file with its
codes and scales overwritten by ONNX Runtime's (`quantize_matmul_4bits`, which its MatMulNBitsQuantizer and GenAI's
builder call; symmetric, round to nearest). The linear layers of the blocks are rounded, the rest is float32 on both
sides. KL is original || export in nats a token over the evaluation windows: as deployed (GenAI, inputs of layers
rounded to 8 bits) and exact (the same file, float32 products). Speed: batch 1, greedy, one thread unless
OMP_NUM_THREADS says otherwise, A B C A B C; beside them the packed model in transformers (`compress.load`). A ratio is
the median over rounds.

Writes benchmarks/results/onnx-NAME.json and .md.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import torch
from arguments import arguments, write_result
from onnxruntime.capi import _pybind_state as kernels
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import compress
from compress.formats.base import Contents
from compress.formats.folder import write_model_folder
from compress.locating import locate
from compress.measure.engine import Engine
from compress.measure.environment import environment
from compress.measure.onnxruntime_engine import OnnxRuntime
from compress.measure.statistics import ratio_interval
from compress.measure.transformers_engine import TransformersEngine
from compress.opening import open_model, read_tokenizer
from compress.preparation import cut_texts
from compress.recipe import Recipe

SHAPE = {
    "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "intermediate_size": 1536, "vocab_size": 49152, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip


def by_onnxruntime(folder: Path, original: PreTrainedModel, place: Path) -> Path:
    """A copy of an export with each layer's codes and scales by ONNX Runtime's own rounding of the original weight."""
    shutil.copytree(folder, place)
    model = onnx.load(place / "model.onnx", load_external_data=False)
    where = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data} for tensor in model.graph.initializer
    }
    weights = original.state_dict()
    with open(place / "model.onnx.data", "r+b") as file:
        for node in model.graph.node:
            if node.op_type != "MatMulNBits":
                continue
            given = {attribute.name: attribute.i for attribute in node.attribute}
            size, rows, columns, bits = given["block_size"], given["N"], given["K"], given["bits"]
            blocks = -(-columns // size)
            codes = np.zeros((rows, blocks, size * bits // 8), np.uint8)
            scales, zeros = np.zeros((rows, blocks), np.float32), np.zeros((rows, -(-blocks * bits // 8)), np.uint8)
            weight = weights[node.input[1].replace("weight_packed", "weight")].t().contiguous().float().numpy()
            call = kernels.quantize_matmul_4bits if bits == 4 else kernels.quantize_matmul_8bits
            call(codes, weight, scales, zeros, size, rows, columns, True)
            for name, array in ((node.input[1], codes), (node.input[2], scales)):
                assert int(where[name]["length"]) == array.nbytes
                file.seek(int(where[name]["offset"]))
                array.tofile(file)
    return place


def opened(folder: Path) -> Engine:
    return OnnxRuntime().open(folder, threads=torch.get_num_threads(), device="cpu")


def divergences(logits: Callable[[list[int]], Any], original: PreTrainedModel, windows: torch.Tensor) -> dict[str, Any]:
    """KL (original || what gives these logits), its interval, and the gap of log-perplexities, nats a token."""
    kl, gap, tokens = [], [], []
    for row in windows:
        found = logits(row.tolist())
        with torch.inference_mode():
            p = original(input_ids=row[None]).logits[0, :-1].float().log_softmax(-1)
        q = torch.from_numpy(np.asarray(found))[:-1].log_softmax(-1)
        kl.append(float((p.exp() * (p - q)).sum(-1).sum()))
        gap.append(float((p - q).gather(1, row[1:, None]).sum()))
        tokens.append(len(row) - 1)
    found_interval = ratio_interval(np.asarray(kl), np.asarray(tokens, dtype=float))
    interval = [found_interval.low, found_interval.high]
    return {"kl": sum(kl) / sum(tokens), "interval": interval, "log_perplexity_gap": sum(gap) / sum(tokens)}


def speeds(
    engines: dict[str, Engine], prompt: Sequence[int], rounds: int, new: int
) -> dict[str, dict[str, list[float]]]:
    """Tokens a second of each engine, in turns; the first round is not counted."""
    found: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in engines}
    for turn in range(rounds + 1):
        for name, engine in engines.items():
            started = time.perf_counter()
            engine.prefill([list(prompt)])
            engine.step()
            read = time.perf_counter()
            for _ in range(new):
                engine.step()
            done = time.perf_counter()
            if turn:
                found[name]["prefill"].append(len(prompt) / (read - started))
                found[name]["decode"].append(new / (done - read))
    return found


def variants(
    original: PreTrainedModel, grid: dict[str, int], calibration: Any
) -> Iterator[tuple[str, PreTrainedModel]]:
    """The model rounded by our methods, anew for each."""
    if calibration is not None:
        model = copy.deepcopy(original)
        compress.GPTQ(**grid)(model, calibration=calibration)
        yield "gptq", model
    model = copy.deepcopy(original)
    compress.RTN(**grid, search=calibration is not None)(model)
    yield "rtn", model


def main() -> None:
    options = arguments(
        __doc__, grids={"nargs": "+", "default": ["4:32", "4:64"]}, rounds={"type": int, "default": 7},
        new={"type": int, "default": 64}, prompt={"type": int, "default": 128},
    )  # fmt: skip
    calibration = evaluation = None
    if options.model == "135m":
        torch.manual_seed(0)
        original = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).eval().requires_grad_(False)
    else:
        data = {"calibration": options.calibration,
                "evaluation": {"source": options.evaluation, "samples": options.samples or 100,
                               "length": options.length}}  # fmt: skip
        recipe = Recipe.from_dict({"model": options.model, "passes": [{"gptq": {}}], "data": data})
        folder = locate(recipe.model)
        original = open_model(folder, dtype="float32").model
        texts = cut_texts(
            recipe.data, ["calibration", "evaluation"], read_tokenizer(folder), original.config, Path.cwd(), 0, folder
        )
        calibration, evaluation = texts["calibration"].tokens, texts["evaluation"].tokens
    prompt = list(range(3, 3 + options.prompt)) if evaluation is None else evaluation[0, : options.prompt].tolist()
    rows: list[dict[str, Any]] = []
    for grid in options.grids:
        bits, group = (int(part) for part in grid.split(":"))
        rows += of_grid(original, {"bits": bits, "group_size": group}, calibration, evaluation, prompt, options)
    result = {"command": "python benchmarks/onnx_export.py ...", "rows": rows,
              "environment": environment(threads=torch.get_num_threads(), device="cpu")}  # fmt: skip
    write_result(f"onnx-{options.name}", result, markdown(rows))
    print(markdown(rows))


def of_grid(
    original: PreTrainedModel, grid: dict[str, int], calibration: Any, evaluation: Any, prompt: list[int], options: Any
) -> list[dict[str, Any]]:
    """A row for each method, ONNX Runtime's own last, and one for the packed model in transformers."""
    rows, engines = [], {}
    with tempfile.TemporaryDirectory() as work:
        folders: dict[str, Path] = {}
        for name, model in variants(original, grid, calibration):
            folders[name] = write_model_folder(Path(work) / name, Contents.of_model(model), "onnx")
            if "compress.load" not in engines:
                for module in model.modules():
                    if hasattr(module, "exact"):
                        module.exact = False  # as compress.load has it
                packed = TransformersEngine(model, "compress.load")
                engines["compress.load"] = packed
        folders["onnxruntime"] = by_onnxruntime(folders["rtn"], original, Path(work) / "theirs")
        engines = {**{name: opened(folder) for name, folder in folders.items()}, **engines}
        for name, folder in folders.items():
            row: dict[str, Any] = {**grid, "rounding": name, "bytes": (folder / "model.onnx.data").stat().st_size}
            if evaluation is not None:
                exact = OnnxRuntime().exact(folder, threads=torch.get_num_threads())
                assert exact is not None
                row["deployed"] = divergences(engines[name].logits, original, evaluation)
                row["exact"] = divergences(exact, original, evaluation)
            rows.append(row)
        rows.append({**grid, "rounding": "compress.load", "bytes": None})
        times = speeds(engines, prompt, options.rounds, options.new)
        for row in rows:
            mine, theirs = times[row["rounding"]], times["onnxruntime"]
            for kind in ("prefill", "decode"):
                row[f"{kind}_tokens_per_second"] = median(mine[kind])
                row[f"{kind}_ratio"] = median(a / b for a, b in zip(mine[kind], theirs[kind], strict=True))
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each rounding."""
    heads = [
        "bits",
        "group",
        "rounding",
        "MB",
        "KL deployed",
        "95 %",
        "KL exact",
        "log-ppl gap",
        "prefill/s",
        "decode/s",
    ]
    lines = ["| " + " | ".join([*heads, "decode ratio"]) + " |", "|---" * 11 + "|"]
    for row in rows:
        found, exact = row.get("deployed"), row.get("exact")
        cells = [
            row["bits"], row["group_size"], row["rounding"], f"{row['bytes'] / 1e6:.2f}" if row["bytes"] else "",
            f"{found['kl']:.5f}" if found else "",
            "{:.5f} to {:.5f}".format(*found["interval"]) if found and found["interval"][0] is not None else "",
            f"{exact['kl']:.5f}" if exact else "", f"{found['log_perplexity_gap']:+.5f}" if found else "",
            f"{row['prefill_tokens_per_second']:.0f}", f"{row['decode_tokens_per_second']:.1f}",
            f"{row['decode_ratio']:.3f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
