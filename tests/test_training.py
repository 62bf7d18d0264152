"""The one training path: what is trained, what is not, and that a killed run ends as if it had not been."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from compress import training
from compress.data import windows_from
from compress.errors import CompressError, StartError
from compress.objectives import TextLoss, checkpointed
from compress.testing import tiny_model, tiny_tokens
from compress.training import train
from compress.training_schedule import Group, Schedule, Training


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


def _train(objective, folder=None, windows=WINDOWS, held_out=None, **changes):
    return train(
        objective, [Group([objective.head.weight], 5e-2)], windows, replace(SCHEDULE, **changes), title="test",
        folder=folder, held_out=held_out,
    )  # fmt: skip


def test_only_the_given_parameters_change_and_the_loss_falls():
    objective = Objective()
    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    losses = _train(objective).losses
    assert len(losses) == 15
    assert sum(losses[-6:]) < sum(losses[:6])
    changed = [name for name, p in objective.named_parameters() if not torch.equal(p, before[name])]
    assert changed == ["head.weight"]
    assert not any(p.requires_grad for p in objective.parameters())


def test_after_each_step_parameters_are_settled_with_the_rate_of_that_step():
    objective, seen = Objective(), []

    def settle(rows, rate):
        seen.append((objective.calls, rate))
        rows.zero_()

    train(objective, [Group([objective.head.weight], 5e-2, settle)], WINDOWS, replace(SCHEDULE, steps=4), title="test")
    assert [calls for calls, _ in seen] == [1, 2, 3, 4]
    assert [rate for _, rate in seen] == pytest.approx([0.0, 0.025, 0.05, 0.025])
    assert not objective.head.weight.any()


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
    with pytest.raises(CompressError, match=r"test: the loss of step 4 is nan, in batch 1: windows (\d+(, )?){4} of"):
        _train(Objective(nan_at=4))
    with pytest.raises(CompressError, match=r"the loss of step 2 is nan, in batch 2 of 2: windows \d+, \d+ of"):
        _train(Objective(nan_at=4), accumulation=2)


def test_the_summary_averages_stretches_of_the_losses():
    summary = Training([4.0, 2.0, 1.0, 1.0, 7.0]).summary(points=2)
    assert summary == [{"step": 2, "loss": 3.0}, {"step": 4, "loss": 1.0}, {"step": 5, "loss": 7.0}]


def test_every_step_is_whole_and_every_window_has_its_turn():
    objective = Objective()
    _train(objective, windows=WINDOWS.select(torch.arange(22)), steps=40)
    assert all(len(seen) == 4 for seen in objective.seen)
    assert {first for seen in objective.seen for first in seen} == set(WINDOWS.tokens[:22, 0].tolist())
    assert objective.seen[:5] != objective.seen[5:10]


class Masked(Objective):
    """The mean over tokens that count."""

    def forward(self, input_ids, attention_mask):
        lost = (self.head(self.embed(input_ids)) - 1).square().mean(-1)
        return (lost * attention_mask).sum() / attention_mask.sum()


def test_micro_batches_give_the_step_of_the_whole_batch_though_padding_is_uneven():
    mask = torch.arange(6) < torch.arange(24)[:, None] % 6 + 1
    windows = replace(WINDOWS, mask=mask)
    whole, parts = Masked(), Masked()
    expected = _train(whole, windows=windows).losses
    losses = _train(parts, windows=windows, accumulation=4).losses
    assert losses == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(parts.head.weight, whole.head.weight, rtol=0, atol=1e-5)


def test_a_batch_that_cannot_be_shared_out_evenly_is_refused():
    with pytest.raises(StartError, match="batch_size 4 cannot be shared out evenly to 1 processes and 3 micro-batches"):
        _train(Objective(), accumulation=3)


class Worsening(nn.Module):
    """A loss on training text that falls while that on held-out text (token 1) rises from the third step on."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, input_ids):
        aim = 0.12 if int(input_ids[0, 0]) == 1 else 1.0
        return (self.head.weight - aim).square().mean()


def test_the_best_weights_on_held_out_text_are_kept_and_training_ends_early(tmp_path, monkeypatch):
    held_out = windows_from(torch.ones(3, 6, dtype=torch.int64), None)
    windows = windows_from(torch.full((24, 6), 2), None)
    options = {"windows": windows, "held_out": held_out, "evaluate_every": 1, "patience": 2, "warmup": 0}
    model = Worsening()
    result = _train(model, **options)
    losses = [entry["loss"] for entry in result.evaluations]
    best = losses.index(min(losses))
    assert 0 < best == result.best_step
    assert len(result.losses) == best + 2 < 15
    assert (float(model.head.weight) - 0.12) ** 2 == pytest.approx(min(losses))
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    kept = Worsening()
    _train(kept, tmp_path, **options)
    again = Worsening()
    assert _train(again, tmp_path, **options) == result  # continued after it had ended early
    assert torch.equal(again.head.weight, model.head.weight)


def test_text_loss_is_the_models_own_of_the_tokens_that_are_to_be_learnt():
    model, tokens = tiny_model("llama"), tiny_tokens(2, 12)
    assert TextLoss(model)(tokens).item() == pytest.approx(model(tokens, labels=tokens).loss.item(), rel=1e-6)
    labels = tokens.clone()
    labels[:, :7] = -100
    assert TextLoss(model)(tokens, labels=labels).item() == pytest.approx(
        model(tokens, labels=labels).loss.item(), rel=1e-6
    )
    mask = torch.ones_like(tokens)
    mask[0, 9:] = 0
    expected = model(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100)).loss.item()
    assert TextLoss(model)(tokens, mask).item() == pytest.approx(expected, rel=1e-6)


def test_checkpointing_gives_the_same_gradients_and_runs_blocks_twice():
    model, tokens = tiny_model("llama"), tiny_tokens(2, 12)
    calls = []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    weight = model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    gradients = []
    for wanted in (False, True):
        weight.grad = None
        with checkpointed(model, wanted):
            TextLoss(model)(tokens).backward()
        gradients.append(weight.grad)
    assert len(calls) == 3
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-8)
    assert not any(module.training for module in model.modules())
