"""Training items: which tokens are learnt, what is cut, and which lines are refused."""

import json

import pytest
import torch

from compress.data import token_windows, windows_from
from compress.errors import CompressError, StartError
from compress.recipe import DataEntry
from compress.testing import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def _entry(path, **more):
    return DataEntry(source=str(path), **more).resolved("training", 0)


def _file(tmp_path, *lines):
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def _learnt(windows, row=0):
    kept = windows.labels[row] != -100
    assert torch.equal(windows.tokens[row][kept], windows.labels[row][kept])
    return TOKENIZER.decode(windows.tokens[row][kept].tolist())


def test_the_completion_and_the_end_of_the_text_are_learnt_the_prompt_and_padding_are_not(tmp_path):
    path = _file(tmp_path, {"prompt": "two and two: ", "completion": "four"}, {"prompt": "a", "completion": "b"})
    windows = token_windows(_entry(path), "training", TOKENIZER, 64)
    assert _learnt(windows, 0) == " four<eos>"
    assert _learnt(windows, 1) == "b<eos>"
    assert windows.tokens[1].tolist()[:1] == [TOKENIZER.bos_token_id]
    assert windows.mask[1].sum() == 4
    assert windows.counts == {}


def test_of_a_chat_what_the_assistant_says_is_learnt_turn_by_turn():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    chat = [("user", "hi"), ("assistant", "yes"), ("user", "so"), ("assistant", "no")]
    item = {"messages": [{"role": role, "content": content} for role, content in chat]}
    windows = windows_from([item], tokenizer, role="training", context=128)
    assert _learnt(windows) == "yes;no;"
    with pytest.raises(CompressError, match=r"python:1: messages: the assistant says nothing"):
        windows_from([{"messages": item["messages"][:1]}], tokenizer, role="training", context=128)


def test_plain_text_is_packed_and_all_of_it_is_learnt(tmp_path):
    path = _file(tmp_path, {"text": "a bee can dig"}, {"text": "every fig"})
    windows = token_windows(_entry(path, length=8), "training", TOKENIZER, 64)
    assert windows.labels is None
    assert windows.mask is None
    assert windows.tokens.shape == (3, 8)


def test_packed_completions_keep_their_labels(tmp_path):
    path = _file(tmp_path, *[{"prompt": "ask", "completion": "say"}] * 4)
    windows = token_windows(_entry(path, pack=True, length=16), "training", TOKENIZER, 64)
    assert windows.mask is None
    assert _learnt(windows) == "say<eos>say<eos>"


def test_a_long_prompt_loses_its_beginning_and_a_long_answer_its_end(tmp_path):
    items = [{"prompt": "abcdefgh", "completion": "xy"}, {"prompt": "a", "completion": "x" * 30}]
    windows = token_windows(_entry(_file(tmp_path, *items), length=6), "training", TOKENIZER, 64)
    assert windows.counts == {"cut": 2}
    assert TOKENIZER.decode(windows.tokens[0].tolist()) == "<bos>ghxy<eos>"
    assert _learnt(windows, 0) == "xy<eos>"
    assert _learnt(windows, 1) == "xxxx"


def test_malformed_lines_are_named_together_or_skipped_and_counted(tmp_path):
    path = _file(tmp_path, {"prompt": "a", "completion": "b"}, "{", {"prompt": "a", "completion": " "}, {"txt": "a"})
    with pytest.raises(CompressError) as caught:
        token_windows(_entry(path), "training", TOKENIZER, 64)
    message = str(caught.value)
    assert "t.jsonl:2: not a line of JSON" in message
    assert "t.jsonl:4: the fields are txt" in message
    assert "skip_bad: true" in message
    windows = token_windows(_entry(path, skip_bad=True), "training", TOKENIZER, 64)
    assert len(windows) == 1
    assert windows.counts == {"skipped": 3}


def test_labels_are_the_classes_of_the_model_by_name_or_index(tmp_path):
    classes = {"bad": 0, "good": 1}

    def cut(item, **more):
        return token_windows(_entry(_file(tmp_path, item), **more), "training", TOKENIZER, 64, labels=classes)

    path = _file(tmp_path, {"text": "fig", "label": "good"}, {"text": "kit", "label": 0})
    windows = token_windows(_entry(path), "training", TOKENIZER, 64, labels=classes)
    assert windows.labels.tolist() == [1, 0]
    with pytest.raises(CompressError, match=r't.jsonl:1: label: "great" is no class .* allowed: 0 \(bad\), 1 \(good\)'):
        token_windows(
            _entry(_file(tmp_path, {"text": "fig", "label": "great"})), "training", TOKENIZER, 64, None, 0, classes
        )
    with pytest.raises(CompressError, match="a line needs text and label"):
        cut({"text": "fig"})
    with pytest.raises(StartError, match=r"data.training.pack: a model that classifies"):
        cut({"text": "fig", "label": 0}, pack=True)


def test_the_fingerprint_depends_on_what_is_learnt(tmp_path):
    one = windows_from([{"prompt": "ab", "completion": "cd"}], TOKENIZER, role="training")
    other = windows_from([{"prompt": "abc", "completion": "d"}], TOKENIZER, role="training")
    assert torch.equal(one.tokens, other.tokens)
    assert one.fingerprint != other.fingerprint
