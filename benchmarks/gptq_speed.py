"""How long GPTQ takes on a Llama with random weights, beside the least that any such method must do.

    python benchmarks/gptq_speed.py [--layers 12] [--dtype bfloat16] [--samples 32] [--length 512] [--threads 2]
        [--against llm-compressor [--peer-python PATH]] [--scaling] [--memory]
        [--keep]

Weights of 4 bits in groups of 128; hidden size 1024, 2816 inside the MLP, 16 heads, a vocabulary of 32000, tied. The
floor is two forward passes over the text through the blocks, the Hessians x^T x of all inputs in float32, and a
Cholesky factorisation of each: what looking at a block, solving and passing the text on come to, nothing beside.
`--against llm-compressor` times its GPTQModifier in a process of its own, if it is installed. `--scaling` shows that
time grows in proportion with blocks (4, 8, 16) and with tokens (1x, 2x, 4x). `--memory` takes the model from a folder
with one block in memory at a time, and gives the peak above what importing torch and transformers takes. `--keep`
measures these two alone, and adds them to the file as it is. Writes `benchmarks/results/gptq_speed.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results" / "gptq_speed.json"
VOCABULARY = 32000


def model_of(layers: int, dtype: str) -> Any:
    """The Llama, with the same random weights each time."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_key_value_heads=16,
        vocab_size=VOCABULARY, num_hidden_layers=layers, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).eval()


def tokens_of(samples: int, length: int) -> torch.Tensor:
    """Random token ids [samples, length]."""
    return torch.randint(0, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(0))


def ours(layers: int, dtype: str, samples: int, length: int) -> float:
    """Seconds of the pass, the model being loaded."""
    from compress.passes.gptq import GPTQ

    model, tokens = model_of(layers, dtype), tokens_of(samples, length)
    started = time.perf_counter()
    GPTQ(bits=4, group_size=128)(model, calibration=tokens)
    return time.perf_counter() - started


def peak(folder: str, samples: int, length: int) -> int:
    """Bytes that opening the folder, the pass and writing the result take at most, one block being in memory."""
    from compress.measure.memory import forget_peak, peak_resident_bytes, resident_bytes

    bare = resident_bytes()
    forget_peak()
    from plan_memory import compressed

    from compress.passes.gptq import GPTQ

    pass_ = GPTQ(bits=4, group_size=128)
    compressed(Path(folder), pass_, tokens_of(samples, length), "disk", Path(folder) / "work", lambda part: None)
    return peak_resident_bytes() - bare


def peak_of(options: argparse.Namespace) -> int:
    """That, in a process of its own, of a folder that is made for it."""
    with tempfile.TemporaryDirectory() as folder:
        model_of(options.layers, options.dtype).save_pretrained(folder)
        shape = (folder, options.samples, options.length)
        return int(in_fresh_process("peak", *shape, threads=options.threads))


@torch.no_grad()
def floor(layers: int, dtype: str, samples: int, length: int) -> dict[str, float]:
    """Seconds of the bare parts: forward passes without hooks, Hessians of inputs that are at hand, factorisations."""
    blocks = model_of(layers, dtype).model
    batches = tokens_of(samples, length).split(max(1, 2048 // length))
    found = {"forward": 0.0, "hessians": 0.0, "cholesky": 0.0}
    started = time.perf_counter()
    for batch in batches:
        blocks(input_ids=batch, use_cache=False)
    found["forward"] = 2 * (time.perf_counter() - started)
    for columns, stages in ((1024, 3), (2816, 1)):
        x, total = torch.randn(batches[0].numel(), columns), torch.zeros(columns, columns)
        started = time.perf_counter()
        total.addmm_(x.t(), x)
        found["hessians"] += (time.perf_counter() - started) * stages * layers * len(batches)
        total.diagonal().add_(1.0)
        started = time.perf_counter()
        torch.linalg.cholesky(total)
        found["cholesky"] += (time.perf_counter() - started) * stages * layers
    return found


def any_tokenizer() -> Any:
    """A tokenizer of two words: one is asked for, and never used, since the text comes as token ids."""
    from tokenizers import Tokenizer, models

    words = models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), unk_token="<unk>", pad_token="<unk>", eos_token="<unk>"
    )


def theirs(layers: int, dtype: str, samples: int, length: int) -> float:
    """Seconds of llm-compressor's GPTQ on the same model and tokens, saving not included."""
    from datasets import Dataset  # type: ignore[import-untyped, unused-ignore]
    from llmcompressor import oneshot  # type: ignore[import-not-found, unused-ignore]
    from llmcompressor.modifiers.quantization import GPTQModifier  # type: ignore[import-not-found, unused-ignore]

    rows = tokens_of(samples, length).tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * length for _ in rows]})
    recipe = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])
    with tempfile.TemporaryDirectory() as folder:
        model_of(layers, dtype).save_pretrained(folder)
        any_tokenizer().save_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        started = time.perf_counter()
        oneshot(
            model=model, dataset=data, recipe=recipe, max_seq_length=length, num_calibration_samples=samples,
            processor=any_tokenizer(),
        )  # fmt: skip
        return time.perf_counter() - started


def in_fresh_process(kind: str, *shape: Any, threads: int, python: str = sys.executable) -> Any:
    """The result of one of the functions above in a process that has done nothing else."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.json"
        job = json.dumps({"kind": kind, "shape": shape, "threads": threads, "out": str(out)})
        subprocess.run([python, __file__, "--job", job], check=True, stdout=sys.stderr)
        return json.loads(out.read_text())


def work(job: dict[str, Any]) -> None:
    torch.set_num_threads(job["threads"])
    kinds: dict[str, Any] = {"ours": ours, "floor": floor, "theirs": theirs, "peak": peak}
    Path(job["out"]).write_text(json.dumps(kinds[job["kind"]](*job["shape"])))


def scaling(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds as blocks and as tokens grow, each also as a multiple of proportional growth from the first row."""
    shapes = [(layers, options.samples) for layers in (4, 8, 16)]
    shapes += [(2, options.samples * times) for times in (1, 2, 4)]
    rows: list[dict[str, Any]] = []
    for index, (layers, samples) in enumerate(shapes):
        seconds = in_fresh_process("ours", layers, options.dtype, samples, options.length, threads=options.threads)
        first = rows[index // 3 * 3] if index % 3 else None
        growth = 1.0 if first is None else layers * samples / (first["layers"] * first["samples"])
        ratio = 1.0 if first is None else seconds / (first["seconds"] * growth)
        rows.append({"layers": layers, "samples": samples, "seconds": round(seconds, 2), "of linear": round(ratio, 3)})
        print(rows[-1], flush=True)
    return rows


def shaped(text: str | None) -> argparse.ArgumentParser:
    """Arguments that say how large the model is and how much text it sees."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    return parser


def compared(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the pass, of the floor, and of the peer if asked for."""
    from compress.measure.environment import environment

    shape = (options.layers, options.dtype, options.samples, options.length)
    parts = in_fresh_process("floor", *shape, threads=options.threads)
    seconds = in_fresh_process("ours", *shape, threads=options.threads)
    least = sum(parts.values())
    result: dict[str, Any] = {
        "environment": environment(threads=options.threads, device="cpu"),
        "layers": options.layers, "dtype": options.dtype, "samples": options.samples, "length": options.length,
        "seconds": round(seconds, 2), "floor": {name: round(value, 2) for name, value in parts.items()},
        "of the floor": round(seconds / least, 3),
    }  # fmt: skip
    print(
        f"{seconds:.1f} s, {seconds / least:.2f} of forward, Hessians, Cholesky and forward ({least:.1f} s)", flush=True
    )
    if options.against:
        other = in_fresh_process("theirs", *shape, threads=options.threads, python=options.peer_python)
        result["llm-compressor seconds"], result["of llm-compressor"] = round(other, 2), round(seconds / other, 3)
        print(f"{other:.1f} s with llm-compressor: {seconds / other:.2f}", flush=True)
    return result


def main() -> int:
    parser = shaped(__doc__)
    parser.add_argument("--against", choices=["llm-compressor"])
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has llm-compressor")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        work(json.loads(options.job))
        return 0
    result = json.loads(RESULTS.read_text()) if options.keep else compared(options)
    if options.scaling:
        result["scaling"] = {"threads": options.threads, "rows": scaling(options)}
    if options.memory:
        result["peak_bytes"] = peak_of(options)
        print(f"{result['peak_bytes'] / 1e6:.0f} MB above the imports, one block in memory", flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
