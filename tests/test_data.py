from __future__ import annotations

import hashlib
import itertools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from compress import text as text_module
from compress.data import Document, documents, items, overlap, token_windows, windows_from
from compress.errors import CompressError, StartError
from compress.recipe import DataEntry

SPECIAL = ["<s>", "</s>", "<unk>", "[CLS]", "[SEP]", "<pad>"]
LETTERS = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz .!?\n"]


def characters(unknown: bool = True, framed: bool = False, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token a character; `framed` puts [CLS] and [SEP] around, as an encoder's does."""
    vocabulary = {token: index for index, token in enumerate(LETTERS)}
    # Without an unknown token, a character that is not in the vocabulary leaves no token at all.
    model = models.WordLevel(vocabulary, unk_token="<unk>") if unknown else models.BPE(vocabulary, [])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if framed:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 3), ("[SEP]", 4)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=8, **({"unk_token": "<unk>"} if unknown else {}), **special
    )


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return characters(bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def ids(text: str) -> list[int]:
    return [LETTERS.index(character) for character in text]


def jsonl(path: Path, *lines: Any) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


STORIES = [{"text": f"story {chr(97 + number)} about a bear. " * (number + 1)} for number in range(8)]


def stream() -> list[int]:
    return [token for story in STORIES for token in [0, *ids(story["text"])]]


# The protocol


def test_random_windows_start_where_the_protocol_says(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = jsonl(tmp_path / "t.jsonl", *STORIES)
    windows = token_windows(DataEntry(source=source, samples=20, length=10), "calibration", tokenizer, 64, seed=1234)
    flat = stream()
    starts = np.random.RandomState(1234).randint(0, len(flat) - 10 - 1, 20)
    assert windows.tokens.tolist() == [flat[start : start + 10] for start in starts]
    assert windows.tokens.dtype == torch.int64
    assert windows.tokens_total == len(flat)
    assert windows.mask is None
    assert windows.role == "calibration"
    assert windows.source == source


def test_the_last_random_window_leaves_one_token_after_it(tokenizer: PreTrainedTokenizerFast) -> None:
    windows = windows_from(["abcdefgh"], tokenizer, samples=50, length=7)  # 9 tokens: starts 0 to 9 - 7 - 1 - 1
    assert windows.tokens.unique(dim=0).tolist() == [[0, *ids("abcdef")]]


def test_sequential_windows_lie_end_to_end(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = jsonl(tmp_path / "t.jsonl", *STORIES)
    flat = stream()
    every = token_windows(DataEntry(source=source, length=10), "evaluation", tokenizer, 64)
    assert every.tokens.flatten().tolist() == flat[: len(flat) // 10 * 10]
    first = token_windows(DataEntry(source=source, length=10, samples=3), "evaluation", tokenizer, 64)
    assert torch.equal(first.tokens, every.tokens[:3])


def test_the_batch_of_the_tokenizer_does_not_show(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = jsonl(tmp_path / "t.jsonl", *STORIES)
    entry = DataEntry(source=source, length=10, samples=4)
    whole = token_windows(entry, "evaluation", tokenizer, 64)
    monkeypatch.setattr("compress.cutting._BATCH", 3)
    again = token_windows(entry, "evaluation", tokenizer, 64)
    assert again.fingerprint == whole.fingerprint
    assert again.tokens_total == whole.tokens_total


def test_the_length_is_at_most_256_and_at_most_the_context(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = jsonl(tmp_path / "t.jsonl", *STORIES)
    assert token_windows(DataEntry(source=source), "evaluation", tokenizer, 16).length == 16
    assert token_windows(DataEntry(source=source), "evaluation", tokenizer, 4096).length == 256
    assert token_windows(DataEntry(source=source), "evaluation", tokenizer, None).length == 256
    with pytest.raises(StartError, match=r"data.evaluation.length: 32 tokens; the model takes at most 16"):
        token_windows(DataEntry(source=source, length=32), "evaluation", tokenizer, 16)


def test_the_seed_of_an_entry_goes_before_that_of_the_recipe(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = jsonl(tmp_path / "t.jsonl", *STORIES)

    def fingerprint(entry_seed: int | None, seed: int) -> str:
        entry = DataEntry(source=source, length=8, seed=entry_seed)
        return token_windows(entry, "calibration", tokenizer, 64, seed=seed).fingerprint

    assert fingerprint(7, 1) == fingerprint(7, 2) == fingerprint(None, 7)
    assert fingerprint(None, 1) != fingerprint(None, 2)


def test_the_fingerprint_is_of_ids_and_shape(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = torch.arange(12)
    wide, tall = (windows_from(tokens.view(*shape), None) for shape in ((2, 6), (3, 4)))
    assert wide.fingerprint != tall.fingerprint
    assert wide.fingerprint == windows_from(tokens.view(2, 6).to(torch.int32), None).fingerprint
    assert wide.fingerprint == hashlib.sha256(b"[2, 6]" + np.arange(12, dtype="<i8").tobytes()).hexdigest()


# Separators


@pytest.mark.parametrize(
    ("special", "first"),
    [({"bos_token": "<s>", "eos_token": "</s>"}, 0), ({"eos_token": "</s>"}, 1), ({"cls_token": "[CLS]"}, 3)],
)
def test_the_separator_is_bos_else_eos_else_cls(tmp_path: Path, special: dict[str, str], first: int) -> None:
    source = jsonl(tmp_path / "t.jsonl", {"text": "abc"}, {"text": "de"})
    windows = token_windows(DataEntry(source=source, length=7), "evaluation", characters(**special), 64)
    assert windows.tokens[0].tolist() == [first, *ids("abc"), first, *ids("de")]


def test_without_any_such_token_separator_none_is_asked_for(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "t.jsonl", {"text": "abc"}, {"text": "de"})
    with pytest.raises(StartError, match=r"data\.evaluation\.separator: .* set separator: none") as caught:
        token_windows(DataEntry(source=source, length=5), "evaluation", characters(), 64)
    assert caught.value.exit_code == 2
    entry = DataEntry(source=source, length=5, separator="none")
    assert token_windows(entry, "evaluation", characters(), 64).tokens[0].tolist() == ids("abcde")


# Documents that stand alone


def test_documents_that_stand_alone_are_cut_and_padded(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = jsonl(tmp_path / "t.jsonl", {"text": "abcdefgh"}, {"text": ""}, {"text": "ab"})
    windows = token_windows(DataEntry(source=source, length=5, pack=False), "evaluation", tokenizer, 64)
    pad = SPECIAL.index("<pad>")
    assert windows.tokens.tolist() == [[0, *ids("abcd")], [0, *ids("ab"), pad, pad]]
    assert windows.mask is not None
    assert windows.mask.tolist() == [[True] * 5, [True] * 3 + [False] * 2]


def test_an_encoder_keeps_its_frame_around_a_document(tmp_path: Path) -> None:
    tokenizer = characters(framed=True, cls_token="[CLS]", sep_token="[SEP]", pad_token="<pad>")
    source = jsonl(tmp_path / "t.jsonl", {"text": "abcdefgh"}, {"text": "ab"})
    windows = token_windows(DataEntry(source=source, length=5, pack=False), "evaluation", tokenizer, 64)
    assert windows.tokens.tolist() == [[3, *ids("abc"), 4], [3, *ids("ab"), 4, 5]]
    plain = DataEntry(source=source, length=5, pack=False, separator="none")
    assert token_windows(plain, "evaluation", tokenizer, 64).tokens[1].tolist() == [*ids("ab"), 5, 5, 5]


def test_documents_are_drawn_without_replacement(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = jsonl(tmp_path / "t.jsonl", *({"text": letter} for letter in "abcdef"))
    entry = DataEntry(source=source, length=5, pack=False, samples=6, sampling="random")
    drawn = token_windows(entry, "calibration", tokenizer, 64, seed=3).tokens[:, 1].tolist()
    assert sorted(drawn) == ids("abcdef")
    assert drawn == [ids("abcdef")[index] for index in np.random.RandomState(3).permutation(6)]
    with pytest.raises(CompressError, match=r"6 documents, 7 are asked for\. .*data.calibration.samples to 6"):
        token_windows(entry.model_copy(update={"samples": 7}), "calibration", tokenizer, 64)


# What a document is


def test_a_txt_file_is_one_document_as_it_stands(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes("\ufeffone\n\ntwo\r\n".encode())
    (document,) = documents(str(path), tmp_path)
    assert document == Document({"text": "one\n\ntwo\r\n"}, f"{path}:1")


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"text": "a b"}, "text", "a b"),
        ({"text": "a", "label": 3}, "text", "a"),
        ({"prompt": "one ", "completion": "two"}, "completion", "one two"),
        ({"question": "who?", "choices": ["me", "you"], "label": 1}, "choice", "who? you"),
        ({"question": "who?", "choices": [" me", " you"], "label": 0, "area": "x"}, "choice", "who? me"),
        ({"good": "he is", "bad": "he are", "uid": 7}, "pair", "he is"),
    ],
)
def test_each_kind_of_line_has_its_text(tmp_path: Path, fields: dict[str, Any], kind: str, text: str) -> None:
    (document,) = documents(jsonl(tmp_path / "t.jsonl", fields), tmp_path)
    assert (document.kind, document.text) == (kind, text)
    assert document.origin == f"{tmp_path / 't.jsonl'}:1"


def test_blank_lines_are_passed_over_and_lines_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b"}')
    assert [(d.text, d.origin) for d in documents("t.jsonl", tmp_path)] == [("a", f"{path}:1"), ("b", f"{path}:4")]


def test_messages_go_through_the_chat_template(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    lines = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}] * 3
    source = jsonl(tmp_path / "t.jsonl", *lines)
    with pytest.raises(CompressError, match=r"t.jsonl:1: messages need a chat template"):
        token_windows(DataEntry(source=source, length=5), "evaluation", tokenizer, 64)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}!{% endfor %}"
    windows = token_windows(DataEntry(source=source, length=7), "evaluation", tokenizer, 64)
    assert windows.tokens[0].tolist() == [0, *ids("hi!yo!")]
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(
        CompressError, match=r"t.jsonl:1: the tokenizer's chat template refuses them \(TemplateError: no"
    ):
        token_windows(DataEntry(source=source, length=7), "evaluation", tokenizer, 64)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", 't.jsonl:2: not a line of JSON: Expecting property name enclosed in double quotes at character 2: "{".'),
        ("text", "t.jsonl:2: not a line of JSON"),
        ('["a"]', 't.jsonl:2: ["a"] is not a mapping of fields; allowed: text; prompt + completion; messages'),
        ("[" * 100_000, "t.jsonl:2: nested too deeply"),
        ('{"n": ' + "9" * 5000 + "}", "t.jsonl:2: not a line of JSON"),
        ('{"txt": "a"}', 't.jsonl:2: the fields are txt; allowed: text; prompt + completion; .* Did you mean "text"?'),
        ("{}", "t.jsonl:2: the fields are none; allowed"),
        ('{"prompt": "a"}', "t.jsonl:2: the fields are prompt; allowed"),
        ('{"text": 3}', "t.jsonl:2: text: 3 is not allowed; allowed: text."),
        ('{"text": "\\ud800"}', "t.jsonl:2: text: .* is not allowed; allowed: text."),
        ('{"messages": []}', "t.jsonl:2: messages: [] is not allowed; allowed: a list of {role, content}."),
        ('{"messages": [{"role": "user"}]}', "t.jsonl:2: messages: .* is not allowed"),
        (
            '{"question": "a", "choices": ["b"], "label": 0}',
            "t.jsonl:2: choices: .* allowed: a list of two texts or more",
        ),
        ('{"question": "a", "choices": ["b", "c"], "label": 2}', "t.jsonl:2: label: 2 is not allowed; allowed: 0 to 1"),
        ('{"question": "a", "choices": ["b", "c"], "label": true}', "t.jsonl:2: label: true is not allowed"),
        ('{"question": "a", "choices": ["b", "c"], "label": "c"}', 't.jsonl:2: label: "c" is not allowed'),
    ],
)
def test_a_malformed_line_is_refused_with_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(CompressError) as caught:
        list(documents(str(path), tmp_path))
    for part in message.split(" .* "):
        assert part in str(caught.value)
    assert caught.value.exit_code == 1
    assert len(str(caught.value)) < len(str(path)) + 300


@pytest.mark.parametrize(("name", "before"), [("t.txt", b"abc"), ("t.jsonl", b'{"text": "abc"}\n')])
def test_bytes_that_are_no_text_are_refused_with_their_offset(tmp_path: Path, name: str, before: bytes) -> None:
    (tmp_path / name).write_bytes(before + b"\xff\xfe rest")
    with pytest.raises(CompressError, match=rf"{name}: not UTF-8 text: byte 0xff at offset {len(before)}\."):
        list(documents(name, tmp_path))


@pytest.mark.parametrize("name", ["stories.jsonl", "stories.txt"])
def test_a_missing_file_is_refused_with_the_nearest_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    wrong = name.replace("stories", "storys")
    with pytest.raises(StartError, match=rf'no such file\. Did you mean "{name}"\?') as caught:
        documents(wrong, tmp_path)
    assert caught.value.exit_code == 2


def test_other_files_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b")
    with pytest.raises(StartError, match=r"t.csv is neither a .txt nor a .jsonl file"):
        documents("t.csv", tmp_path)
    with pytest.raises(StartError, match="is a folder"):
        documents(".", tmp_path)
    with pytest.raises(StartError, match=r"builtin:tinny does not exist; allowed: builtin:tiny"):
        documents("builtin:tinny", tmp_path)


# Texts that do not suffice


@pytest.mark.parametrize(
    ("name", "content"), [("t.txt", ""), ("t.jsonl", ""), ("t.jsonl", "\n \n"), ("t.jsonl", '{"text": ""}\n')]
)
@pytest.mark.parametrize("pack", [True, False])
def test_an_empty_text_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str, content: str, pack: bool
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CompressError, match=f"{name}: holds no text") as caught:
        token_windows(DataEntry(source=str(tmp_path / name), pack=pack), "evaluation", tokenizer, 64)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("unknown", [True, False])
def test_a_text_of_which_the_tokenizer_knows_nothing_is_refused(tmp_path: Path, unknown: bool) -> None:
    tokenizer = characters(unknown=unknown, bos_token="<s>")
    source = jsonl(tmp_path / "t.jsonl", {"text": "漢字" * 20}, {"text": "仮名"})
    with pytest.raises(CompressError, match="the model's tokenizer knows none of its 42 characters"):
        token_windows(DataEntry(source=source, length=2), "evaluation", tokenizer, 64)


@pytest.mark.parametrize(
    ("entry", "needed"),
    [
        ({"length": 20}, "20 are needed"),
        ({"length": 5, "samples": 4}, "20 are needed"),
        ({"length": 18, "sampling": "random", "samples": 1}, "20 are needed"),
    ],
)
def test_a_text_that_is_too_short_says_how_many_tokens_there_are_and_are_needed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, entry: dict[str, Any], needed: str
) -> None:
    source = jsonl(tmp_path / "t.jsonl", {"text": "a" * 18})
    with pytest.raises(CompressError, match=f"too short: 19 tokens, {needed}"):
        token_windows(DataEntry(source=source, **entry), "evaluation", tokenizer, 64)
    jsonl(tmp_path / "t.jsonl", {"text": "a" * 19})
    assert len(token_windows(DataEntry(source=source, **entry), "evaluation", tokenizer, 64))


# The embedded model's text


def test_builtin_text_is_drawn_only_as_far_as_needed(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, str, int]] = []

    def generated(name: str, split: str, seed: int = 0) -> Iterator[str]:
        for number in itertools.count():
            drawn.append((name, split, seed))
            yield chr(97 + number % 26) * 9

    monkeypatch.setattr("compress.builtin.documents", generated)
    evaluation = token_windows(DataEntry(source="builtin:tiny", length=20), "evaluation", tokenizer, 64, seed=5)
    assert evaluation.tokens.shape == (64, 20)
    assert evaluation.tokens_total == 64 * 20
    assert set(drawn) == {("tiny", "evaluation", 5)}
    assert len(drawn) <= 64 * 20 // 10 + 64
    calibration = token_windows(DataEntry(source="builtin:tiny", length=20), "calibration", tokenizer, 64)
    assert calibration.tokens.shape == (128, 20)
    assert calibration.tokens_total == 2590


def test_builtin_splits_share_no_document(tokenizer: PreTrainedTokenizerFast) -> None:
    entry = DataEntry(source="builtin:tiny", length=64, samples=40)
    calibration, evaluation = (token_windows(entry, role, tokenizer, 64) for role in ("calibration", "evaluation"))  # type: ignore[arg-type]
    assert overlap(calibration, evaluation) == 0
    assert overlap(evaluation, evaluation) == 1


# Hugging Face datasets


class Hub:
    """Stands in for the hub: what splits there are, and their rows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, splits: dict[str, list[dict[str, Any]]]):
        import datasets

        self.splits = splits
        self.asked: list[tuple[Any, ...]] = []
        monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, configuration: list(self.splits))
        monkeypatch.setattr(datasets, "load_dataset", self.load)

    def load(self, name: str, configuration: str | None, split: str, streaming: bool) -> list[dict[str, Any]]:
        self.asked.append((name, configuration, split, streaming))
        return self.splits[split]


def test_a_dataset_of_the_hub_is_streamed_from_the_split_of_its_role(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub = Hub(monkeypatch, {"train": [{"text": "a"}], "validation": [{"text": "b"}, {"txt": "c"}]})
    assert [document.text for document in documents("org/set", tmp_path, "calibration")] == ["a"]
    rows = documents("org/set:en", tmp_path, "evaluation")
    assert next(rows) == Document({"text": "b"}, "org/set:en:validation:1")
    with pytest.raises(CompressError, match="org/set:en:validation:2: the fields are txt"):
        next(rows)
    list(documents("org/set::train", tmp_path, "evaluation"))
    assert hub.asked == [
        ("org/set", None, "train", True),
        ("org/set", "en", "validation", True),
        ("org/set", None, "train", True),
    ]
    with pytest.raises(StartError, match="has no split dev; it has train, validation"):
        documents("org/set::dev", tmp_path)


def test_a_hub_that_cannot_be_reached_is_said_to_be_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    def unreachable(*_: Any) -> None:
        raise ConnectionError("offline mode is enabled")

    monkeypatch.setattr(datasets, "get_dataset_split_names", unreachable)
    with pytest.raises(
        StartError, match=r"org/set: no such file here, .* needs the hub, which cannot be reached"
    ) as caught:
        documents("org/set", tmp_path)
    assert "offline mode is enabled" in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_dataset_that_breaks_off_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "a"}
        raise ConnectionError("gone")

    Hub(monkeypatch, {"train": rows()})  # type: ignore[dict-item]
    with pytest.raises(CompressError, match=r"org/set: reading the dataset failed \(ConnectionError: gone\)") as caught:
        list(documents("org/set", tmp_path))
    assert caught.value.exit_code == 1


def test_a_large_dataset_is_not_read_to_its_end(
    monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    read = []

    def rows(*_: Any) -> Iterator[Document]:
        for number in itertools.count():
            read.append(number)
            yield Document({"text": "a" * 99}, "x")

    monkeypatch.setattr(text_module, "_hub", rows)
    windows = token_windows(DataEntry(source="org/endless", samples=4, length=50), "calibration", tokenizer, 64)
    assert windows.tokens.shape == (4, 50)
    assert len(read) <= 8 * 4 * 50 // 100 + 64


# Texts and ids given in Python


def test_texts_in_python_follow_the_protocol_of_files(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = jsonl(tmp_path / "t.jsonl", *STORIES)
    texts = [story["text"] for story in STORIES]
    entry = DataEntry(source=source, length=8)
    expected = token_windows(entry, "calibration", tokenizer, 64, seed=3)
    given = windows_from(iter(texts), tokenizer, length=8, seed=3, context=64)
    assert given.fingerprint == expected.fingerprint
    assert len(given) == 128
    assert len(windows_from("".join(texts), tokenizer, samples=5, length=8)) == 5


def test_token_ids_are_used_as_they_are() -> None:
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]], dtype=torch.int32)
    windows = windows_from(tokens, None)
    assert windows.tokens.dtype == torch.int64
    assert windows.tokens.tolist() == tokens.tolist()


@pytest.mark.parametrize(
    ("calibration", "context", "message"),
    [
        (
            torch.ones(3, dtype=torch.int64),
            None,
            r"token ids must be integers of shape \[samples, length\], not torch.int64 \[3\]",
        ),
        (torch.ones(3, 2), None, "token ids must be integers"),
        (torch.ones(0, 2, dtype=torch.int64), None, "token ids must be integers"),
        (torch.ones(3, 9, dtype=torch.int64), 8, "windows of 9 tokens; the model takes at most 8"),
        (["a text"], 8, "texts need a tokenizer"),
    ],
)
def test_what_cannot_be_windows_is_refused(calibration: Any, context: int | None, message: str) -> None:
    with pytest.raises(StartError, match=message):
        windows_from(calibration, None, context=context)


def test_short_texts_in_python_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(CompressError, match="too short"):
        windows_from(["a"], tokenizer, length=8)


def test_long_documents_raise_no_warning(tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        windows_from(["a" * 500], tokenizer, samples=2, length=8)
    assert not caplog.records


# Overlap


def test_overlap_is_the_share_of_the_evaluation_that_training_holds(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    draw = np.random.RandomState(0)
    texts = [{"text": "".join(draw.choice(list("abcdefgh"), 60))} for _ in range(8)]
    training = jsonl(tmp_path / "a.jsonl", *texts[:4])
    evaluation = jsonl(tmp_path / "b.jsonl", *texts[5:], texts[3])
    first = token_windows(DataEntry(source=training, length=9), "training", tokenizer, 64)
    second = token_windows(DataEntry(source=evaluation, length=9), "evaluation", tokenizer, 64)
    assert overlap(first, second) == 0.25
    other = windows_from(["nothing of the kind here. " * 9], tokenizer, length=9, samples=3)
    assert overlap(other, second) == 0


def test_overlap_of_plain_ids_is_found_by_windows() -> None:
    first, second = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[3, 4], [5, 6], [7, 8], [1, 3]])
    assert overlap(windows_from(first, None), windows_from(second, None)) == 0.25


# Items


def test_items_have_their_fields_and_an_area(tmp_path: Path) -> None:
    source = jsonl(
        tmp_path / "mixed.jsonl",
        {"question": "who?", "choices": ["me", "you"], "label": 1, "extra": 3},
        {"good": "he is", "bad": "he are", "area": "grammar"},
        {"prompt": "2+2=", "completion": "4"},
    )
    assert items(source) == [
        {"question": "who?", "choices": ["me", "you"], "label": 1, "area": "mixed"},
        {"good": "he is", "bad": "he are", "area": "grammar"},
        {"prompt": "2+2=", "completion": "4", "area": "mixed"},
    ]
    assert items("mixed.jsonl", tmp_path) == items(source)


def test_builtin_items_cover_every_area() -> None:
    from compress.builtin import areas

    found = items("builtin:tiny")
    assert {item["area"] for item in found} == set(areas())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", "", "holds no test items"),
        ("t.jsonl", '{"text": "a"}', r"t.jsonl:1: no test item; allowed: question \+ choices \+ label"),
        ("t.txt", "a", "test items are lines of a .jsonl file"),
    ],
)
def test_what_is_no_task_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CompressError, match=message):
        items(str(tmp_path / name))
    with pytest.raises(StartError, match="no such file"):
        items(str(tmp_path / "none.jsonl"))
