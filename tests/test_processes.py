"""Several processes train one model: the same losses and, but for the order of sums, the same weights as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import compress
from compress.distillation import Distillation
from compress.errors import StartError
from compress.losses import Loss
from compress.objectives import TextLoss
from compress.passes.end_to_end import _Imitation
from compress.pipeline import run
from compress.sharding import _same_structure, _units, check_launch, shared_out
from compress.teacher_cache import Kept
from compress.testing import save_tiny, tiny_model, tiny_tokens
from compress.workspace import Guest, Stage

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

TORCHRUN = [
    "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
]  # fmt: skip

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


def _environment(tmp_path):
    root = str(Path(__file__).parents[1])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}


def _launched(tmp_path, passes, folder, fsdp):
    """The report of a run on two processes, as a user starts them."""
    recipe, config = tmp_path / "recipe.yaml", tmp_path / "fsdp.yaml"
    recipe.write_text(json.dumps(_values(folder, tmp_path / "together", passes)))
    config.write_text(FSDP)
    accelerate = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
    done = subprocess.run(
        [sys.executable, *(accelerate if fsdp else TORCHRUN), "-m", "compress", "run", str(recipe), "--quiet",
         "--device", "cpu"],
        env=_environment(tmp_path), capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip().splitlines() == [str(tmp_path / "together/report.json")]
    return json.loads((tmp_path / "together/report.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("passes", "fsdp"), [(LORA, False), (LORA, True), (DISTILL, False)], ids=["lora", "lora-fsdp", "distill"]
)
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


@pytest.mark.slow
def test_shares_are_trained_as_the_whole_is_and_a_killed_training_of_shares_goes_on(tmp_path):
    found = {}
    shares = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    for name, command, options in (("whole", [], {}), ("shares", TORCHRUN, shares)):
        folder = tmp_path / name
        folder.mkdir()
        script = [str(Path(__file__).with_name("sharded_training.py")), str(folder), *(["kill"] if options else [])]
        done = subprocess.run(
            [sys.executable, *command, *script], env={**_environment(tmp_path), **options}, capture_output=True,
            text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        found[name] = torch.load(folder / "result.pt")
    whole, shares = found["whole"], found["shares"]
    assert len(whole["losses"]) == 6
    assert shares["losses"] == pytest.approx(whole["losses"], rel=1e-3)
    assert [e["loss"] for e in shares["held out"]] == pytest.approx([e["loss"] for e in whole["held out"]], rel=1e-3)
    assert all(torch.allclose(t, shares["weights"][name], rtol=0, atol=1e-4) for name, t in whole["weights"].items())


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("FSDP_VERSION", "1", "fsdp_version: 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "gradient_checkpointing"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed"),
    ],
)
def test_a_launch_in_a_way_that_there_is_not_is_refused(name, value, says, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    check_launch()
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    monkeypatch.setenv(name, value)
    with pytest.raises(StartError, match=says):
        check_launch()


def test_shares_have_the_memory_of_the_objective_and_its_teacher_is_the_same():
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=1)
    objective = _Imitation(student, teacher)
    copy = _same_structure(objective)
    assert copy.student is not student
    assert copy.teacher is teacher
    for name, parameter in objective.named_parameters():
        assert copy.get_parameter(name) is not parameter
        assert copy.get_parameter(name).data_ptr() == parameter.data_ptr()
    assert _units(copy) == list(copy.student.model.layers)
    copy.student.model.layers[0].mlp.up_proj.weight = copy.student.model.layers[1].mlp.up_proj.weight
    assert _units(copy) == [copy.student.model.layers[2]]


def test_zeros_held_by_hooks_cannot_be_shared_out():
    model = tiny_model("llama")
    model.lm_head.weight.register_hook(lambda gradient: gradient)
    with pytest.raises(StartError, match="FSDP"):
        shared_out(TextLoss(model), torch.device("cpu"), "distill")


def test_another_process_does_not_make_again_what_the_run_has_kept(tmp_path):
    made = []
    guest = Guest(tmp_path)
    assert guest.once("control", lambda: made.append(1) or {"losses": [1]}) == {"losses": [1]}
    assert not list(tmp_path.iterdir())
    Stage(tmp_path).once("control", lambda: {"losses": [2]})
    assert guest.once("control", lambda: made.append(1) or {}) == {"losses": [2]}
    assert len(made) == 1


@pytest.mark.parametrize(("losses", "unused"), [(["hidden"], True), (["hidden", "kl"], False), (["labels"], False)])
def test_a_student_whose_head_no_loss_uses_says_so(losses, unused):
    chosen = [Loss.model_validate(loss) for loss in losses]
    objective = Distillation(
        tiny_model("llama"), chosen, Kept(0, 96), None, [[] for _ in chosen], torch.nn.ModuleDict()
    )
    assert objective.may_leave_unused is unused


def test_texts_that_the_student_writes_and_shares_do_not_go_together(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(StartError, match="on_policy"):
        compress.Distill(on_policy=0.5, tokens=512)(
            tiny_model("llama", seed=1), training=tiny_tokens(8, 16), original=tiny_model("llama")
        )
