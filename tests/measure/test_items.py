import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress.errors import CompressError
from compress.measure import items as scoring
from compress.testing import tiny_tokenizer


@pytest.fixture(scope="module")
def model(pair):
    return AutoModelForCausalLM.from_pretrained(pair[0]).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def slow_log_likelihood(model, tokenizer, before: str, after: str) -> float:
    """One text at a time, float64, bos in front, sum over the characters of `after` (one token each)."""
    ids = [tokenizer.bos_token_id, *tokenizer(before + after, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    table = torch.log_softmax(logits, -1)
    return sum(float(table[i - 1, ids[i]]) for i in range(len(ids) - len(after), len(ids)))


def test_a_choice_is_scored_by_its_log_likelihood_per_byte(model, tokenizer):
    item = {"question": "a bee is", "choices": ["good", "an old kit", "moss"], "label": 0}
    scores = [slow_log_likelihood(model, tokenizer, "a bee is", " " + c) / len(c.encode()) for c in item["choices"]]
    best = max(range(3), key=lambda i: scores[i])
    for label in range(3):
        found = scoring.score_items(model, tokenizer, [{**item, "label": label}])
        assert found == [int(label == best)]


def test_batches_give_the_likelihoods_of_single_texts(model, tokenizer):
    requests = [scoring.encode(tokenizer, "the ", word) for word in ("bee", "fig and hen", "a", "lamp moss jam")]
    found = scoring.score(model, requests)
    for answer, word in zip(found, ("bee", "fig and hen", "a", "lamp moss jam"), strict=True):
        # The space at the seam belongs to the continuation.
        assert answer.log_likelihood == pytest.approx(
            slow_log_likelihood(model, tokenizer, "the", " " + word), abs=1e-4
        )


def test_the_good_sentence_is_right_when_it_is_likelier(model, tokenizer):
    good, bad = "the hen runs.", "hen the runs."
    likelier = slow_log_likelihood(model, tokenizer, "", good) > slow_log_likelihood(model, tokenizer, "", bad)
    assert scoring.score_items(model, tokenizer, [{"good": good, "bad": bad}]) == [int(likelier)]
    assert scoring.score_items(model, tokenizer, [{"good": bad, "bad": good}]) == [int(not likelier)]


def test_an_exact_answer_is_what_greedy_decoding_writes(model, tokenizer):
    prompt = "the bee"
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
    written = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)[
        0, ids.shape[1] :
    ]
    request = scoring.Request((*ids[0].tolist(), *written.tolist()), ids.shape[1])
    assert scoring.score(model, [request])[0].greedy
    wrong = [*written.tolist()]
    wrong[3] = (wrong[3] + 1) % 60
    assert not scoring.score(model, [scoring.Request((*ids[0].tolist(), *wrong), ids.shape[1])])[0].greedy


def test_ties_and_answers_that_are_not_numbers_are_not_right():
    same = scoring.Answer(-3.0, False)
    item = {"question": "q", "choices": ["ab", "cd"], "label": 0}
    assert not scoring.is_right(item, [same, same])
    assert not scoring.is_right({"good": "a", "bad": "b"}, [same, same])
    assert not scoring.is_right({"good": "a", "bad": "b"}, [scoring.Answer(math.nan, False), same])


def test_text_beyond_the_context_loses_its_beginning(tokenizer):
    request = scoring.encode(tokenizer, "a" * 50, "bcd", context=10)
    assert len(request.ids) == 10
    assert len(request.ids) - request.start == 3


def test_an_item_of_no_known_form_is_refused_with_its_fields():
    with pytest.raises(CompressError, match=r"question, choices and label.*has: text"):
        scoring.texts({"text": "x"})
