import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress.errors import CompressError
from compress.measure import likelihood
from compress.testing import tiny_tokens


@pytest.fixture(scope="module")
def models(pair):
    return [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in pair]


@pytest.fixture(scope="module")
def windows():
    return tiny_tokens(samples=7, length=24, seed=5)


def full_tables(models, windows):
    """Log-probabilities [n, length, vocabulary] of every model, in float64."""
    with torch.no_grad():
        return [torch.log_softmax(model.double()(windows).logits, -1) for model in models]


@pytest.fixture(scope="module")
def exact(pair, windows):
    return full_tables([AutoModelForCausalLM.from_pretrained(folder).eval() for folder in pair], windows)


def test_window_scores_agree_with_full_float64_tables(models, windows, exact, monkeypatch):
    p, q = (table[:, :-1] for table in exact)
    targets = windows[:, 1:, None]
    # Small budgets, so that several batches and several chunks of positions are gone through.
    monkeypatch.setattr(likelihood, "TOKENS_BUDGET", 3 * 24)
    monkeypatch.setattr(likelihood, "CHUNK_BUDGET", 3 * 96 * 5)
    found = likelihood.window_scores(models[1], windows, reference=models[0])
    assert found.tokens.tolist() == [23.0] * 7
    torch.testing.assert_close(found.nll, -q.gather(-1, targets).sum((1, 2)), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.reference_nll, -p.gather(-1, targets).sum((1, 2)), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.kl, (p.exp() * (p - q)).sum((1, 2)), rtol=1e-4, atol=1e-4)
    assert found.top1.tolist() == (p.argmax(-1) == q.argmax(-1)).sum(1).tolist()


def test_a_model_is_no_distance_from_itself(models, windows):
    found = likelihood.window_scores(models[0], windows, reference=models[0])
    assert found.kl.abs().max() == 0
    assert torch.equal(found.top1, found.tokens)


def test_padding_is_not_scored(models, windows):
    mask = torch.ones_like(windows, dtype=torch.bool)
    mask[2, 10:] = False
    found = likelihood.window_scores(models[0], windows, mask=mask)
    alone = likelihood.window_scores(models[0], windows[2:3, :10])
    assert found.tokens[2] == 9
    assert found.nll[2] == pytest.approx(float(alone.nll[0]), abs=1e-4)


def test_a_token_the_original_never_gives_adds_nothing():
    p = torch.tensor([[[0.0, math.log(3.0), -torch.inf]]])
    q = torch.tensor([[[0.0, 0.0, -torch.inf]]])
    found = likelihood._scores(q, torch.tensor([[0]]), p)
    want = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert float(found["kl"]) == pytest.approx(want, abs=1e-6)


def test_a_token_outside_the_vocabulary_is_named(models):
    with pytest.raises(CompressError, match="Token 1000 lies outside the model's vocabulary of 96"):
        likelihood.window_scores(models[0], torch.full((1, 4), 1000))


def test_batches_stay_within_the_budget_of_logits():
    parts = list(likelihood.batches(n=10, length=1024, vocabulary=128_000))
    assert len(parts) == 10
