"""Several processes train one model: the same losses and, but for the order of sums, the same adapter as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compress.adapters import Adapter
from compress.pipeline import run
from compress.testing import save_tiny


def _values(folder, output):
    text = {"source": "builtin:tiny", "samples": 21, "length": 16}
    lora = {"r": 4, "tokens": 8 * 16 * 5, "batch_size": 8, "held_out": 0.1, "precision": "float32"}
    return {
        "model": str(folder), "data": {"training": text}, "benchmark": False, "output": str(output),
        "passes": [{"rtn": {"bits": 4, "group_size": 16}}, {"lora": lora}],
    }  # fmt: skip


@pytest.mark.slow
def test_two_processes_have_the_loss_curve_of_one(tmp_path, unverified):
    folder = save_tiny(tmp_path / "model", num_hidden_layers=2)
    alone = run(_values(folder, tmp_path / "alone"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(_values(folder, tmp_path / "together")))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    done = subprocess.run(
        [*command, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "compress", "run", str(recipe),
         "--quiet", "--device", "cpu"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines() == [str(tmp_path / "together/report.json")]
    report = json.loads((tmp_path / "together/report.json").read_text())
    losses = [stage["measurements"] for stage in (alone.stages[1].model_dump(), report["stages"][1])]
    for key in ("losses", "held_out_losses"):
        pairs = zip(losses[0][key], losses[1][key], strict=True)
        assert all(a["loss"] == pytest.approx(b["loss"], rel=1e-3) for a, b in pairs)
    adapters = [Adapter.read(tmp_path / name / "adapter") for name in ("alone", "together")]
    for name, tensor in adapters[0].tensors.items():
        assert torch.allclose(tensor, adapters[1].tensors[name], rtol=0, atol=1e-3)
