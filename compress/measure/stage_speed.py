"""How fast the model writes that a pass on the way has left: written as a folder and run as that would be, in turn with
the original, in a fresh process; with few tokens, since it is a point in a plot and not what the run is judged by.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint import disk_errors
from compress.errors import CompressError
from compress.formats.folder import packed_export_note, write_model_folder
from compress.measure.jobs import run_job
from compress.measure.measurements import BenchmarkJob, SpeedSettings
from compress.measure.running import prompt_tokens
from compress.progress import Progress
from compress.registry import METRICS
from compress.reports.report import Figure

if TYPE_CHECKING:
    from compress.model import ModelHandle
    from compress.recipe.sections import Runtime

DECODE = "decode_tokens_per_second"
#: Two readings of a short prompt, and 32 tokens written, five times.
SETTINGS = SpeedSettings(prompt=32, decode_prompt=32, new_tokens=32, rounds=5, warmup=1)


def stage_speed(
    model: ModelHandle, original: Path, job: BenchmarkJob, runtime: Runtime, workdir: Path, progress: Progress
) -> Figure:
    """Decode speed of the model as it stands. `original`: the folder that it is timed in turn with; `runtime`: how the
    result will be run. `detail` has the original's figure, and the ratio to it.

    Null with the reason where the model cannot be written or run by itself.
    """
    folder = workdir / "stage"
    try:
        with progress.step("speed so far") as step:
            write_stage(model, folder, runtime)
            settings = replace(job, speed=SETTINGS)
            asked = [(original, job.dtype), (folder / "model", "auto")]
            request: dict[str, Any] = {
                "kind": "speed", "model": str(folder / "model"), "speed": asdict(SETTINGS), "device": job.device,
                "threads": job.threads, "seed": job.seed,
                "engines": [
                    {"runtime": "transformers", "folder": str(place), "dtype": dtype} for place, dtype in asked
                ],
            }  # fmt: skip
            result = run_job(request, workdir, inputs={"prompt": prompt_tokens(folder / "model", settings)}, step=step)
    except CompressError as error:  # of what this family or format does not allow, the run is not to die
        return Figure(value=None, reason=f"not measured: {error}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rounds = [result.records.get(f"{index}/{DECODE}") for index in (0, 1)]
    if any(each is None for each in rounds):
        return Figure(value=None, reason="the model does not generate text")
    metric = METRICS.get(DECODE)
    before, after = (metric().compute(predictions=each.tolist()) for each in rounds if each is not None)
    detail = {
        **after.pop("detail"), "original": before["value"], "ratio": after["value"] / before["value"],
        "batch": 1, "prompt_tokens": SETTINGS.decode_prompt, "new_tokens": SETTINGS.new_tokens,
    }  # fmt: skip
    return Figure(
        unit=metric.unit, higher_is_better=metric.higher_is_better, runtime=result.values["engines"][1]["runtime"],
        detail=detail, **after,
    )  # fmt: skip


def write_stage(model: ModelHandle, folder: Path, runtime: Runtime) -> None:
    """The model as it stands, as a run would leave it: `model/`, and what stands beside that."""
    with disk_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if model.adapter is not None:
            model.adapter.save(folder / "adapter")
    contents = replace(model.contents(), runtime=runtime.model_dump(exclude_defaults=True))
    write_model_folder(folder / "model", contents)
    if packed_export_note(contents):
        write_model_folder(folder / "exports" / "packed", contents, "packed")
