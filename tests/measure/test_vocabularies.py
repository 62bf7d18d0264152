import pytest
import torch

import compress
from compress.measure.likelihood import window_scores
from compress.measure.vocabularies import note, paired_scores, paired_windows
from compress.pipeline import run
from compress.testing import tiny_model, tiny_tokens
from tests import reference
from tests.test_vocab import _values, folder  # noqa: F401  (a fixture)


def _cut(tokens):
    """A model and a cut of it, the table from old ids to new ones with two pieces for a token that is gone."""
    model, small = tiny_model(), tiny_model()
    kept = compress.Vocab(multiple=1)(small, calibration=tokens).kept_tokens
    new = {old: index for index, old in enumerate(kept)}
    table = [[new[i]] if i in new else [i % len(kept), (i * 7) % len(kept)] for i in range(96)]
    return model, small, table, [(old, new[old]) for old in kept]


def test_a_cut_model_on_text_that_it_kept_is_the_original_without_the_rest():
    tokens = tiny_tokens(3, 12)
    model, small, table, shared = _cut(tokens)
    pairing = paired_windows(tokens, None, table, shared, None)
    scores, mass = paired_scores(small, tokens, pairing, reference=model)
    assert scores.tokens.tolist() == [11, 11, 11]
    assert torch.allclose(scores.kl, torch.zeros(3).double(), atol=1e-5)
    assert torch.allclose(scores.reference_nll, window_scores(model, tokens).nll)
    assert (mass < scores.tokens).all()
    assert (scores.nll < scores.reference_nll).all()  # what the lost tokens had goes to those that are left


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("without", [None, 0, 4])
def test_scores_are_the_textbooks_where_tokens_are_gone(padded, without):
    tokens = tiny_tokens(4, 10, seed=1)
    model, small, table, shared = _cut(tiny_tokens(2, 16))
    if without is not None:  # a token that the new tokenizer cannot write at all
        table[int(tokens[0, without])] = []
    mask = torch.arange(10) < torch.tensor([[10], [7], [2], [9]]) if padded else None
    pairing = paired_windows(tokens, mask, table, shared, None)
    assert pairing.windows.shape[1] > 10
    scores, mass = paired_scores(small, tokens, pairing, reference=model, mask=mask)
    for index, window in enumerate(tokens.tolist()):
        words = window if mask is None else window[: int(mask[index].sum())]
        nll, kl, top1, share = reference.two_vocabularies(model, small, words, table, shared)
        places = [at for at in range(1, len(words)) if table[words[at]] and any(table[w] for w in words[:at])]
        assert scores.tokens[index] == len(places)
        assert float(scores.nll[index]) == pytest.approx(nll, rel=1e-4)
        assert float(scores.kl[index]) == pytest.approx(kl, rel=1e-3, abs=1e-5)
        assert float(scores.top1[index]) == top1
        assert float(mass[index]) == pytest.approx(share, rel=1e-4)


def test_tokens_that_do_not_fit_the_context_are_counted_and_left_out():
    tokens = torch.tensor([[4, 5, 6, 7]])
    table = [[i] for i in range(8)]
    table[5], table[6] = [1, 2, 3], []
    pairing = paired_windows(tokens, None, table, [(i, i) for i in range(5)], 5)
    assert pairing.windows.tolist() == [[4, 1, 2, 3, 7]]
    assert pairing.token_of.tolist() == [[0, 1, 1, 1, 3]]
    assert pairing.left_out == 1
    assert "1 tokens cannot be written" in note(pairing, 0.5)
    assert paired_windows(tokens, None, table, [], 4).left_out == 2


@pytest.mark.slow
def test_a_run_compares_the_models_on_the_same_text(folder, tmp_path):  # noqa: F811
    values = _values(folder, tmp_path / "out")
    values["data"]["evaluation"] = {"source": str(folder / "text.jsonl"), "samples": 6, "length": 16}
    report = run({**values, "benchmark": {"metrics": ["perplexity", "kl_divergence", "top1_agreement"]}})
    assert report.compressed["kl_divergence"].value == pytest.approx(0, abs=1e-5)
    assert report.comparison["kl_divergence"].verdict == "no_difference"
    assert report.compressed["perplexity"].value < report.original["perplexity"].value
    assert report.comparison["perplexity"].ci_low is not None
    assert any("vocabularies differ" in line and "% of its probability" in line for line in report.notes)


def test_speed_is_taken_on_ids_that_both_models_have(tmp_path):
    from compress.measure.measurements import BenchmarkJob
    from compress.measure.running import prompt_tokens
    from compress.testing import save_tiny

    small = save_tiny(tmp_path / "model", vocab_size=80)
    assert int(prompt_tokens(small, BenchmarkJob(windows=tiny_tokens())).max()) < 80
