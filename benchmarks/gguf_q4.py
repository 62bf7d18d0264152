"""Our roundings on the grid of llama.cpp's blocks beside llama.cpp's own, in llama.cpp, at equal bytes.

    python benchmarks/gguf_q4.py MODEL --data builtin:tiny | --calibration FILE --evaluation FILE --name NAME
        [--types Q4_0 Q2_K Q3_K Q4_K Q6_K] [--methods rtn gptq gptaq autoround] [--samples 100] [--rounds 40]
        [--threads 1]

All start from one dense GGUF file of the model. llama.cpp's are made by its own `llama_model_quantize`, every matrix of
the blocks in the type at hand and the embedding in Q8_0, without and with an importance matrix (the mean square of
every input column over the calibration windows). Ours are passes with `grid: gguf-q4_0` and so on, `embeddings: 8`,
exported (gptaq is gptq with `propagation: gptaq`). KL and the gap of log-perplexity are to the dense file, all run by
llama.cpp over the same evaluation windows. Speed of decoding is measured in turns with llama.cpp's own file of that
type, opened once more, a prompt of 32 tokens and 64 new ones each; the row "llama.cpp" is that file against itself, and
says what the machine's noise is.

Adds to benchmarks/results/gguf.json and writes gguf.md.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from k_quants import column_squares
from transformers import PreTrainedModel

import compress
from compress.data import Windows
from compress.formats.base import Contents
from compress.formats.folder import write_model_folder
from compress.formats.gguf import FILE
from compress.formats.gguf_families import place_of
from compress.locating import locate
from compress.measure.engine import Engine
from compress.measure.llama_cpp import LlamaCpp
from compress.opening import open_model, read_tokenizer
from compress.preparation import cut_texts
from compress.recipe import Recipe

RESULTS = Path(__file__).parent / "results"
PROMPT, NEW = 32, 64
PASSES: dict[str, Callable[..., Any]] = {
    "rtn": compress.RTN, "gptq": compress.GPTQ, "gptaq": partial(compress.GPTQ, propagation="gptaq"),
    "autoround": compress.AutoRound,
}  # fmt: skip
#: llama.cpp's number of a file that is mostly of one type, by the type of its matrices.
FILE_TYPES = {"Q4_0": 2, "Q2_K": 10, "Q3_K": 11, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18}


def own_blocks(kind: str, dense: Path, target: Path, importance: dict[str, torch.Tensor] | None, threads: int) -> None:
    """llama.cpp's blocks of a dense file. `importance`: column weights by the tensors' names in the file."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.pure = FILE_TYPES[kind], threads, True
    params.token_embedding_type = params.output_tensor_type = 8  # Q8_0
    kept: list[Any] = []
    if importance is not None:
        entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
        for entry, (name, weights) in zip(entries, importance.items(), strict=False):
            values = np.ascontiguousarray(weights.float().numpy())
            kept += [name.encode(), values]
            entry.name, entry.size = kept[-2], values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = entries
    write_blocks(dense, target, params)


def write_blocks(dense: Path, target: Path, params: Any) -> None:
    """Has llama.cpp round a dense file as its `params` say, into a folder of its own."""
    import llama_cpp

    target.parent.mkdir(parents=True)
    if llama_cpp.llama_model_quantize(str(dense).encode(), str(target).encode(), ctypes.byref(params)):
        raise RuntimeError("llama_model_quantize failed.")


def ours(
    original: PreTrainedModel, kind: str, method: str, folder: Path, texts: dict[str, Windows], tokenizer: Any
) -> None:
    """One of our passes on the grid, exported."""
    model = copy.deepcopy(original)
    made = PASSES[method](grid=f"gguf-{kind.lower()}", embeddings=8)
    given: dict[str, Any] = {"calibration": texts["calibration"].tokens} if made.takes_calibration else {}
    if made.needs_original:
        given["original"] = original
    made(model, **given)
    write_model_folder(folder, Contents.of_model(model, tokenizer), "gguf")


def quality(dense: Engine, engine: Engine, windows: torch.Tensor) -> dict[str, float]:
    """Means over the positions that are scored, all but each window's first."""
    sums = {"kl_divergence": 0.0, "log_perplexity_gap": 0.0, "top1_agreement": 0.0}
    for row in windows:
        ids = row.tolist()
        before, after = (
            torch.from_numpy(np.asarray(each.logits(ids)))[:-1].double().log_softmax(1) for each in (dense, engine)
        )
        sums["kl_divergence"] += float((before.exp() * (before - after)).sum())
        sums["log_perplexity_gap"] += float((before - after).gather(1, row[1:, None]).sum())
        sums["top1_agreement"] += float((before.argmax(1) == after.argmax(1)).sum())
    return {name: total / (windows.shape[0] * (windows.shape[1] - 1)) for name, total in sums.items()}


def speed_ratio(engine: Engine, other: Engine, prompt: Sequence[int], rounds: int) -> tuple[float, float]:
    """Tokens a second of decoding by `engine`, and its median ratio to `other`'s in the same round; who comes first
    changes from round to round."""
    rates, ratios = [], []
    for index in range(rounds + 1):
        found = {}
        for each in (engine, other) if index % 2 else (other, engine):
            each.prefill([prompt])
            started = time.perf_counter()
            for _ in range(NEW):
                each.step()
            found[id(each)] = NEW / (time.perf_counter() - started)
        if index:  # the first round warms up
            rates.append(found[id(engine)])
            ratios.append(found[id(engine)] / found[id(other)])
    return statistics.median(rates), statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--data", help="a source for calibration and evaluation alike (builtin:tiny)")
    parser.add_argument("--calibration")
    parser.add_argument("--evaluation")
    parser.add_argument("--name", required=True)
    parser.add_argument("--types", nargs="+", default=["Q4_0"], choices=list(FILE_TYPES))
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq", "autoround"], choices=list(PASSES))
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sources = {
        role: str(Path(file).resolve()) if file else options.data
        for role, file in (("calibration", options.calibration), ("evaluation", options.evaluation))
    }
    recipe = Recipe.from_dict(
        {
            "model": options.model, "passes": [{"gptq": {}}],
            "data": {"calibration": sources["calibration"],
                     "evaluation": {"source": sources["evaluation"], "samples": options.samples}},
        }
    )  # fmt: skip
    folder = locate(recipe.model)
    original = open_model(folder).model
    tokenizer = read_tokenizer(folder)
    texts = cut_texts(
        recipe.data, ["calibration", "evaluation"], tokenizer, original.config, Path.cwd(), 0, folder
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        for kind in options.types:
            write(compared(options, kind, original, tokenizer, texts, Path(place)), options.name, kind)


def compared(
    options: argparse.Namespace, kind: str, original: PreTrainedModel, tokenizer: Any, texts: dict[str, Windows],
    place: Path,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each file of one type: what it takes, what it costs, how fast it is."""
    contents = Contents.of_model(original, tokenizer)
    dense = write_model_folder(place / "dense", contents, "gguf") / FILE
    place = place / kind
    named = place_of(contents)
    importance = {
        named(f"{name}.weight"): squares for name, squares in column_squares(original, texts["calibration"]).items()
    }
    seconds = {}
    for method in ["llama.cpp", "llama.cpp, imatrix", *options.methods]:
        started = time.monotonic()
        if method in PASSES:
            ours(original, kind, method, place / method, texts, tokenizer)
        else:
            own_blocks(kind, dense, place / method / FILE, importance if "imatrix" in method else None, options.threads)
        seconds[method] = time.monotonic() - started
    engines = {name: LlamaCpp().open(place / name, threads=options.threads, device="cpu") for name in seconds}
    reference = LlamaCpp().open(dense.parent, threads=options.threads, device="cpu")
    again = LlamaCpp().open(place / "llama.cpp", threads=options.threads, device="cpu")
    prompt = texts["evaluation"].tokens[0, :PROMPT].tolist()
    rows = []
    for name, engine in engines.items():
        rate, ratio = speed_ratio(engine, again, prompt, options.rounds)
        rows.append({
            "model": options.name, "type": kind, "method": name, "bytes": (place / name / FILE).stat().st_size,
            "seconds": round(seconds[name], 1), **quality(reference, engine, texts["evaluation"].tokens),
            "decode_tokens_per_second": rate, "speed_ratio": ratio,
            "windows": len(texts["evaluation"]), "threads": options.threads,
        })  # fmt: skip
        print(markdown(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def write(rows: list[dict[str, Any]], name: str, kind: str) -> None:
    """Puts the rows of one model and type in the place of those that were there of it."""
    import llama_cpp

    place = RESULTS / "gguf.json"
    found = json.loads(place.read_text())["rows"] if place.exists() else []
    found = [row for row in found if (row["model"], row["type"]) != (name, kind)] + rows
    versions = {"llama-cpp-python": llama_cpp.__version__, "torch": torch.__version__}
    place.write_text(
        json.dumps({"command": "python benchmarks/gguf_q4.py ...", "versions": versions, "rows": found}, indent=1)
        + "\n"
    )
    place.with_suffix(".md").write_text(markdown(found))


def markdown(rows: list[dict[str, Any]]) -> str:
    """A line for each file."""
    lines = [
        "| model | type | by | bytes | KL | log-ppl gap | top-1 | decode speed / llama.cpp's own | seconds to make |",
        "|---|" + "---|" * 8,
    ]
    for row in rows:
        cells = [
            row["model"], row["type"], row["method"], f"{row['bytes']}", f"{row['kl_divergence']:.5f}",
            f"{row['log_perplexity_gap']:.5f}", f"{row['top1_agreement']:.4f}", f"{row['speed_ratio']:.3f}",
            f"{row['seconds']}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
