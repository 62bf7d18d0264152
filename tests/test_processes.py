"""Several processes train one model: the same losses and, but for the order of sums, the same weights as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compress.errors import StartError
from compress.pipeline import run
from compress.sharding import check_launch
from compress.testing import save_tiny

#: accelerate's config for FSDP, as in docs/several-processes.md.
FSDP = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
num_machines: 1
num_processes: 2
mixed_precision: 'no'
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
"""

LORA = [
    {"rtn": {"bits": 4, "group_size": 16}},
    {"lora": {"r": 4, "tokens": 8 * 16 * 5, "batch_size": 8, "held_out": 0.1, "precision": "float32"}},
]
DISTILL = [
    {"distill": {"student": {"layers": 2}, "steps": 5, "batch_size": 8, "learning_rate": 1e-3, "precision": "float32"}}
]


def _values(folder, output, passes):
    text = {"source": "builtin:tiny", "samples": 21, "length": 16}
    return {
        "model": str(folder), "data": {"training": text}, "benchmark": False, "output": str(output), "passes": passes,
    }  # fmt: skip


def _launched(tmp_path, passes, folder, fsdp):
    """The report of a run on two processes, as a user starts them."""
    recipe, config = tmp_path / "recipe.yaml", tmp_path / "fsdp.yaml"
    recipe.write_text(json.dumps(_values(folder, tmp_path / "together", passes)))
    config.write_text(FSDP)
    accelerate = ["accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
    torchrun = [
        "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", *(accelerate if fsdp else torchrun), "-m", "compress", "run", str(recipe), "--quiet",
         "--device", "cpu"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1",
             "XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip().splitlines() == [str(tmp_path / "together/report.json")]
    return json.loads((tmp_path / "together/report.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["data-parallel", "fsdp"])
@pytest.mark.parametrize("passes", [LORA, DISTILL], ids=["lora", "distill"])
def test_two_processes_have_the_loss_curve_of_one(passes, fsdp, tmp_path, unverified):
    folder = save_tiny(tmp_path / "model", num_hidden_layers=3)
    alone = run(_values(folder, tmp_path / "alone", passes))
    report = _launched(tmp_path, passes, folder, fsdp)
    losses = [stage["measurements"] for stage in (alone.stages[-1].model_dump(), report["stages"][-1])]
    for key in ("losses", "held_out_losses"):
        pairs = list(zip(losses[0].get(key, []), losses[1].get(key, []), strict=True))
        assert len(pairs) >= 5 or key != "losses"
        assert all(a["loss"] == pytest.approx(b["loss"], rel=1e-3) for a, b in pairs)
    kept = "adapter/adapter_model.safetensors" if passes is LORA else "model/model.safetensors"
    weights = [load_file(tmp_path / name / kept) for name in ("alone", "together")]
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], rtol=0, atol=1e-3)
