"""Run by test_processes.py, once on one process and once on two (`torchrun`): the training path itself.

`FOLDER kill`: trains, is killed in step 4, and goes on from its checkpoint; `FOLDER`: trains in one go. What came of it
is written to FOLDER/result.pt by the first process.
"""

import sys
from pathlib import Path

import torch

from compress import training
from compress.data import windows_from
from compress.objectives import TextLoss
from compress.processes import meet, process_count, process_rank
from compress.testing import tiny_model, tiny_tokens
from compress.training_schedule import Group, Schedule

folder, kill = Path(sys.argv[1]), "kill" in sys.argv
torch.set_num_threads(1)
training.CHECKPOINT_SECONDS = 0.0
windows = windows_from(tiny_tokens(24, 16), None)
end_step = training._Trainer.end_step


def settle(rows, rate):
    """Shares are settled as the whole is."""
    rows.mul_(1 - 20 * rate)


def trained(stop):
    """Losses and weights of a training that ends by an interrupt after step `stop`; None if it did."""
    model = tiny_model("llama")
    parameters = [p for name, p in model.named_parameters() if "mlp" in name or "norm" in name or "embed" in name]

    def counted(self, due):
        due = end_step(self, due)
        if len(self.losses) > stop:
            raise KeyboardInterrupt
        return due

    training._Trainer.end_step = counted
    schedule = Schedule(6, 8, evaluate_every=2, max_grad_norm=1.0, accumulation=2)
    try:
        done = training.train(
            TextLoss(model), [Group(parameters, 2e-3, settle)], windows, schedule, title="t",
            folder=folder / "training", held_out=windows.select(torch.arange(4)),
        )  # fmt: skip
    except KeyboardInterrupt:
        return None
    return {"losses": done.losses, "held out": done.evaluations, "weights": model.state_dict()}


if process_count() > 1:
    meet("cpu")
if kill:
    assert trained(3) is None
result = trained(99)
if not process_rank():
    torch.save(result, folder / "result.pt")
