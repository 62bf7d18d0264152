"""The one training path: what is trained, what is not, and that a killed run ends as if it had not been."""

import pytest
import torch
from torch import nn

from compress import training
from compress.data import windows_from
from compress.errors import CompressError
from compress.training import Group, Schedule, train


class Objective(nn.Module):
    """Learns the mean of embedded tokens; `fail_at`: which forward raises; `nan_at`: which one gives NaN."""

    def __init__(self, fail_at=None, nan_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(96, 8)
        self.head = nn.Linear(8, 8)
        self.fail_at, self.nan_at, self.calls, self.seen = fail_at, nan_at, 0, []

    def forward(self, input_ids, attention_mask=None):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        self.seen.append(input_ids[:, 0].tolist())
        loss = (self.head(self.embed(input_ids)) - 1).square().mean()
        return loss * float("nan") if self.calls == self.nan_at else loss


WINDOWS = windows_from(torch.randint(0, 96, (24, 6), generator=torch.Generator().manual_seed(0)), None)
SCHEDULE = Schedule(steps=15, batch_size=4, warmup=2, seed=3)


def _train(objective, folder=None):
    return train(objective, [Group([objective.head.weight], 5e-2)], WINDOWS, SCHEDULE, title="test", folder=folder)


def test_only_the_given_parameters_change_and_the_loss_falls():
    objective = Objective()
    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    losses = _train(objective).losses
    assert len(losses) == 15
    assert sum(losses[-6:]) < sum(losses[:6])
    changed = [name for name, p in objective.named_parameters() if not torch.equal(p, before[name])]
    assert changed == ["head.weight"]
    assert not any(p.requires_grad for p in objective.parameters())


def test_a_killed_training_ends_with_the_same_weights_and_losses(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    whole = Objective()
    expected = _train(whole)
    with pytest.raises(KeyboardInterrupt):
        _train(Objective(fail_at=9), tmp_path)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-8"]
    (tmp_path / "checkpoint-99").mkdir()  # one that was being written
    resumed = Objective()
    result = _train(resumed, tmp_path)
    assert resumed.calls == 7
    assert resumed.seen == whole.seen[8:]
    assert torch.equal(resumed.head.weight, whole.head.weight)
    assert result.losses == expected.losses


def test_a_loss_that_is_not_finite_stops_with_the_step():
    with pytest.raises(CompressError, match="test: the loss of step 4 is nan"):
        _train(Objective(nan_at=4))


def test_the_summary_averages_stretches_of_the_losses():
    summary = training.Training([4.0, 2.0, 1.0, 1.0, 7.0]).summary(points=2)
    assert summary == [{"step": 2, "loss": 3.0}, {"step": 4, "loss": 1.0}, {"step": 5, "loss": 7.0}]
