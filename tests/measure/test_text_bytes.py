"""Bits per byte, with one tokenizer and with two."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from compress.errors import CompressError
from compress.measure.benchmark import measure_compressed, measure_original
from compress.measure.comparison import compare, original_figures
from compress.measure.measurements import BenchmarkJob
from compress.measure.text_bytes import byte_table, score_texts, scored_bytes, why_foreign, window_texts
from compress.testing import save_tiny, tiny_tokenizer

TEXT = "Ein Käse für 3 €, 好 – and\n\ttwo  spaces."


def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level BPE with every byte and a few merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "s")]
    vocabulary = {token: i for i, token in enumerate(["<s>", *letters, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def sentence_piece() -> PreTrainedTokenizerFast:
    """A vocabulary with marks for spaces, and words for bytes that it has no letter for."""
    tokens = ["<unk>", "<s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁Einsefr3,–adtwop.", "▁a", "▁two"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_the_bytes_of_a_texts_tokens_are_the_texts(make):
    tokenizer = make()
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    table = byte_table(tokenizer)
    assert int(table[torch.tensor(ids)].sum()) == len(TEXT.encode())
    assert table[tokenizer.bos_token_id] == 0


def test_a_tokenizer_of_letters_counts_theirs_and_no_bytes_for_special_tokens():
    table = byte_table(tiny_tokenizer(), 96)
    assert len(table) == 96
    windows = torch.tensor([[1, 5, 6, 1, 7]])
    assert scored_bytes(windows, torch.tensor([[True, True, True, False]]), table).tolist() == [2.0]


@pytest.mark.usefixtures("same_process")
def test_bits_per_byte_are_the_nats_of_perplexity_over_the_bytes(pair, windows, tmp_path):
    job = BenchmarkJob(windows=windows, metrics=("perplexity", "bits_per_byte"), threads=1)
    found = measure_original(str(pair[0]), job=job, workdir=tmp_path)
    table = byte_table(tiny_tokenizer(), 96)
    size = float(table[windows[:, 1:]].sum())
    nats = math.log(found.figures["perplexity"].value) * windows[:, 1:].numel()
    assert found.figures["bits_per_byte"].value == pytest.approx(nats / math.log(2) / size)


def test_texts_are_scored_whole_also_beyond_the_context(pair):
    model = AutoModelForCausalLM.from_pretrained(pair[0]).eval()
    tokenizer = tiny_tokenizer()
    texts = ["the bee is a bee", "", "fig"]
    nats, size, unknown = score_texts(model, tokenizer, texts, 10)
    want = []
    for text in texts:
        total, ids = 0.0, tokenizer(text)["input_ids"]
        for start in range(0, len(ids), 9):
            row = torch.tensor([[1, *ids[start : start + 9]]])
            with torch.no_grad():
                table = torch.log_softmax(model(row).logits[0, :-1].double(), -1)
            total -= float(table.gather(-1, row[0, 1:, None]).sum())
        want.append(total)
    assert nats.tolist() == pytest.approx(want, rel=1e-5)
    assert size.tolist() == [16.0, 0.0, 3.0]
    assert unknown == 0


def test_a_tokenizer_without_a_token_to_begin_with_is_refused(pair):
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(CompressError, match="no token that begins or ends a text"):
        score_texts(AutoModelForCausalLM.from_pretrained(pair[0]), tokenizer, ["a"], 10)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model whose tokenizer is another one."""
    folder = tmp_path_factory.mktemp("other")
    save_tiny(folder, vocab_size=300)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    byte_level().save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("same_process")
def test_of_two_tokenizers_perplexity_is_refused_and_bits_per_byte_measured_on_one_text(pair, other, windows, tmp_path):
    names = ("perplexity", "bits_per_byte", "kl_divergence", "kl_divergence_p99", "top1_agreement")
    job = BenchmarkJob(windows=windows, metrics=names, threads=1)
    first = measure_original(str(pair[0]), job=job, workdir=tmp_path)
    second = measure_compressed(other, str(pair[0]), first, job=job, workdir=tmp_path)
    for name in set(names) - {"bits_per_byte"}:
        assert second.figures[name].value is None
        assert "tokenizers differ" in second.figures[name].reason
    texts = window_texts(windows, None, tiny_tokenizer())
    size = sum(len(text.encode()) for text in texts)
    figures = original_figures(first, second)
    for folder, tokenizer, found in ((pair[0], tiny_tokenizer(), figures), (other, byte_level(), second.figures)):
        nats, counted, _ = score_texts(AutoModelForCausalLM.from_pretrained(folder), tokenizer, texts, 64)
        assert counted.sum() == size
        assert found["bits_per_byte"].value == pytest.approx(float(nats.sum()) / math.log(2) / size, rel=1e-5)
    compared = compare(first, second)
    assert compared["bits_per_byte"].ci_low <= compared["bits_per_byte"].delta <= compared["bits_per_byte"].ci_high
    assert compared["perplexity"].verdict == "not_tested"
    assert any("cut anew by each model's own tokenizer" in note for note in second.notes)


def test_tokenizers_differ_where_the_same_id_is_another_token(pair, other, tmp_path):
    assert why_foreign(pair[0], pair[1]) is None
    assert "96 and" in why_foreign(pair[0], other) or "tokens" in why_foreign(pair[0], other)
    wider = tmp_path / "wider"
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(wider)
    assert why_foreign(pair[0], wider) is None


@pytest.mark.usefixtures("same_process")
def test_a_folder_without_a_tokenizer_has_perplexity_and_no_bits_per_byte(pair, windows, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((pair[0] / name).read_bytes())
    job = BenchmarkJob(windows=windows, metrics=("perplexity", "bits_per_byte"), threads=1)
    found = measure_original(str(folder), job=job, workdir=tmp_path / "work")
    assert found.figures["perplexity"].value > 1
    assert "holds no tokenizer" in found.figures["bits_per_byte"].reason
    json.dumps(found.figures["bits_per_byte"].model_dump())
