"""Cutting a tokenizer: text of the tokens that stay is encoded to the same pieces, all other text is still encoded."""

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from compress.errors import StartError
from compress.vocabulary import Pieces, expansion, pieces_of, read_cut, template_tokens, write_cut
from tests import reference

TEXT = [
    "The old house stood by the river, and nobody knew who had built it there.",
    "Houses by rivers are seldom dry; the builder knew that, the owner did not.",
    "In 1984 there were 37 owners. Every owner said: nobody told us, we never knew!",
    "Unbelievable stories were told and retold, rebuilt like the house itself.",
]
DOMAIN = ["The owner knew the river.", "The house stood there, nobody knew who built it."]
UNKNOWN = ["Été in Köln: 12 €", "unowned riverhouses, retelling", "日本"]


def byte_level(**options):
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>")


def byte_fallback():
    """As converted from sentencepiece: characters, bytes for the others, and every merge that leads to a token."""
    words = [word for text in TEXT for word in ("▁" + text.replace(" ", "▁")).replace("▁", " ▁").split()]
    parts = sorted({w[a:b] for w in words for a in range(len(w)) for b in range(a + 2, min(a + 6, len(w)) + 1)})
    tokens = random.Random(0).sample(parts, 200)
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))])}
    for token in [*sorted({c for w in words for c in w}), *sorted(tokens, key=len)]:
        vocab.setdefault(token, len(vocab))
    halves = [(t[:k], t[k:]) for t in vocab if len(t) < 7 for k in range(1, len(t))]
    merges = [pair for pair in halves if pair[0] in vocab and pair[1] in vocab]
    merges.sort(key=lambda pair: vocab[pair[0] + pair[1]])
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_piece():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")


KINDS = {
    "byte-level": byte_level, "ignore-merges": lambda: byte_level(ignore_merges=True), "byte-fallback": byte_fallback,
    "wordpiece": word_piece, "unigram": unigram,
}  # fmt: skip


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def order_for(tokenizer, texts):
    """The ids to keep for the tokens of `texts`, as the pass puts them together."""
    pieces = pieces_of(tokenizer)
    words = {index: piece for piece, index in pieces.all().items()}
    used = {index for text in texts for index in ids(tokenizer, text)} | pieces.always()
    kept = {pieces.all()[piece] for index in used for piece in pieces.needs(words[index])}
    return pieces.order(kept, len(tokenizer))


def cut(tokenizer, order, folder):
    write_cut(tokenizer, order, folder / "cut")
    return read_cut(folder / "cut", tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_text_of_the_domain_is_encoded_to_the_same_pieces(kind, tmp_path):
    old = KINDS[kind]()
    order = order_for(old, DOMAIN)
    new = cut(old, order, tmp_path)
    assert len(new) == len(order) < len(old)
    for text in DOMAIN:
        before, after = old(text)["input_ids"], new(text)["input_ids"]
        assert [order[index] for index in after] == before
        assert new.convert_ids_to_tokens(after) == old.convert_ids_to_tokens(before)
        assert new.decode(after) == old.decode(before)


@pytest.mark.parametrize("kind", KINDS)
def test_it_holds_for_any_words_of_the_tokenizer(kind, tmp_path):
    old = KINDS[kind]()
    words = [word for text in TEXT for word in text.split()]
    for seed in range(8):
        domain = [" ".join(random.Random(seed).choices(words, k=6)) for _ in range(2)]
        order = order_for(old, domain)
        new = cut(old, order, tmp_path / str(seed))
        assert [[order[i] for i in ids(new, text)] for text in domain] == [ids(old, text) for text in domain]


@pytest.mark.parametrize("kind", KINDS)
def test_other_text_falls_back_on_bytes_or_the_unknown_token(kind, tmp_path):
    old = KINDS[kind]()
    new = cut(old, order_for(old, DOMAIN), tmp_path)
    for text in UNKNOWN:
        encoded = ids(new, text)
        assert encoded
        assert max(encoded) < len(new)
        if kind in ("byte-level", "ignore-merges", "byte-fallback"):
            assert new.decode(encoded).strip() == text
        elif "日" in text:
            assert new.unk_token_id in encoded


@pytest.mark.parametrize("kind", KINDS)
def test_special_and_added_tokens_stay_what_they_are(kind, tmp_path):
    old = KINDS[kind]()
    old.add_tokens([AddedToken("<tool>", normalized=False)])
    old.add_special_tokens({"additional_special_tokens": ["<image>"]})
    old.chat_template = "{% for m in messages %}<tool>owner: {{ m.content }}{% endfor %}"
    new = cut(old, order_for(old, DOMAIN), tmp_path)
    assert set(new.all_special_tokens) == set(old.all_special_tokens)
    assert new.special_tokens_map == old.special_tokens_map
    text = "the<tool>the<image>"
    assert new.convert_ids_to_tokens(ids(new, text)) == old.convert_ids_to_tokens(ids(old, text))
    assert "<image>" in new.convert_ids_to_tokens(ids(new, text))
    assert new.chat_template == old.chat_template
    text = "The river"
    framed = [old.convert_ids_to_tokens(old(text)["input_ids"]), new.convert_ids_to_tokens(new(text)["input_ids"])]
    assert framed[0] == framed[1]


def test_a_token_needs_those_that_the_textbook_merges_on_the_way_to_it():
    for make in (byte_level, byte_fallback):
        pieces = pieces_of(make())
        merges = pieces.merges()
        for token in list(pieces.ids)[::7]:
            if token not in pieces.added and not token.startswith("<0x"):
                assert pieces.needs(token) == {*reference.bpe_steps(token, merges), token} & set(pieces.ids)


def test_merges_stay_where_parts_and_result_do(tmp_path):
    old = byte_level()
    order = order_for(old, DOMAIN)
    spec = pieces_of(old).cut(order)
    left = set(spec["model"]["vocab"])
    expected = [list(pair) for pair in pieces_of(old).merges() if {*pair, "".join(pair)} <= left]
    assert spec["model"]["merges"] == expected
    assert 0 < len(expected) < len(pieces_of(old).merges())


def test_marks_of_words_ends_are_understood():
    spec = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "b</w>": 2, "ab</w>": 3}, "merges": ["a b</w>"],
                      "end_of_word_suffix": "</w>"}}  # fmt: skip
    assert Pieces(spec).needs("ab</w>") == {"a", "b</w>", "ab</w>"}
    spec = {"model": {"type": "BPE", "vocab": {"a": 0, "##b": 1, "ab": 2}, "merges": ["a ##b"],
                      "continuing_subword_prefix": "##"}}  # fmt: skip
    assert Pieces(spec).needs("ab") == {"a", "##b", "ab"}


def test_a_token_that_is_gone_expands_to_pieces_of_the_same_text(tmp_path):
    for number, make in enumerate((byte_level, byte_fallback)):
        old = make()
        new = cut(old, order_for(old, DOMAIN), tmp_path / str(number))
        table = expansion(old, new)
        assert any(len(pieces) > 1 for pieces in table)
        for text in TEXT:
            pieces = [piece for index in ids(old, text) for piece in table[index]]
            assert new.decode(pieces) == old.decode(ids(old, text))
        assert expansion(old, old) is None
        assert expansion(new, old) is None


def test_the_words_of_a_chat_template_are_found():
    tokenizer = byte_level()
    assert template_tokens(tokenizer) == set()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "the {{ m.role }}{% endfor %}{% if add_generation_prompt %}river{% endif %}"
    )
    assert {*ids(tokenizer, "the user"), *ids(tokenizer, "river")} <= template_tokens(tokenizer)


def test_every_place_that_names_an_id_is_renumbered():
    template = {"type": "TemplateProcessing", "special_tokens": {"c": {"id": "c", "ids": [2], "tokens": ["c"]}}}
    bert = {"type": "BertProcessing", "sep": ["d", 3], "cls": ["c", 2]}
    spec = {
        "model": {"type": "Unigram", "vocab": [["a", -1], ["b", -9], ["c", -2], ["d", -3], ["e", 0]], "unk_id": 4},
        "post_processor": {"type": "Sequence", "processors": [template, bert]}, "padding": {"pad_id": 3},
    }  # fmt: skip
    pieces = Pieces(spec)
    assert pieces.always() == {1, 2, 3, 4}  # the least likely, both of the frame, the unknown one
    new = pieces.cut([1, 2, 3, 4])
    assert [piece for piece, _ in new["model"]["vocab"]] == ["b", "c", "d", "e"]
    assert (new["model"]["unk_id"], new["padding"]["pad_id"]) == (3, 2)
    first, second = new["post_processor"]["processors"]
    assert (first["special_tokens"]["c"]["ids"], second["sep"], second["cls"]) == ([1], ["d", 2], ["c", 1])
    assert spec["model"]["unk_id"] == 4


def test_a_tokenizer_without_the_tokenizers_library_is_refused():
    with pytest.raises(StartError, match=r"has no tokenizer\.json"):
        pieces_of(object())
