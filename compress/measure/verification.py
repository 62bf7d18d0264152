"""Proof that the exported folder is the model that was in memory, by somebody who does not have this package."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import CompressError
from compress.measure.jobs import run_child
from compress.reports.report import Verified

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CHECK = Path(__file__).with_name("plain_check.py")
TOLERANCE, TOLERANCE_16_BIT = 1e-3, 1e-2


def plain_output(folder: Path, ids: Tensor, workdir: Path, *, device: str = "cpu", threads: int = 1) -> Tensor:
    """What plain transformers computes from the folder in a fresh process that never imports this package.

    `ids`: int64 [n, length]. Float32 logits [n, length, vocabulary]; of an encoder, the last hidden state. An adapter
    that stands beside the folder is put in by plain peft.
    """
    from safetensors.torch import load_file, save_file

    from compress.locating import adapter_beside, locate
    from compress.measure.runtimes import auto_class, read_config

    folder = locate(folder)
    adapter = adapter_beside(folder)
    workdir.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="verify-", dir=workdir))
    try:
        save_file({"ids": ids.contiguous()}, work / "ids.safetensors")
        job = {
            "model": str(folder), "ids": str(work / "ids.safetensors"), "out": str(work / "output.safetensors"),
            "auto": auto_class(read_config(folder)), "adapter": None if adapter is None else str(adapter),
            "dtype": "auto", "device": device, "threads": threads,
        }  # fmt: skip
        (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, "-P", str(CHECK), str(work / "job.json")]
        run_child(command, what=f"loading {folder} by plain transformers", threads=threads)
        return load_file(work / "output.safetensors")["output"].clone()
    finally:
        shutil.rmtree(work, ignore_errors=True)


def verify(
    folder: Path,
    ids: Tensor,
    output: Tensor,
    *,
    dtype: torch.dtype,
    workdir: Path,
    device: str = "cpu",
    threads: int = 1,
) -> Verified:
    """Compares the folder, reloaded, with `output`: what the model in memory gives for the same ids.

    `output`: any float dtype, shaped as `plain_output`'s; `dtype`: the one the model computes in. CompressError when
    the folder does not load or differs by more than 1e-3 (1e-2 in 16 bits).
    """
    import torch

    reloaded = plain_output(folder, ids, workdir, device=device, threads=threads)
    if reloaded.shape != output.shape:
        raise CompressError(
            f"{folder} was reloaded by transformers and is another model: its output has shape "
            f"{tuple(reloaded.shape)}, the model in memory gave {tuple(output.shape)}."
        )
    difference = float((reloaded - output.float().cpu()).abs().max())
    allowed = TOLERANCE_16_BIT if dtype in (torch.bfloat16, torch.float16) else TOLERANCE
    if not difference <= allowed:
        raise CompressError(
            f"{folder} was reloaded by transformers and differs from the model in memory: the largest difference of "
            f"its output is {difference:.3g}, {allowed:g} is allowed. The export is not verified."
        )
    return Verified(reloaded=True, by="transformers", max_logit_difference=difference)
