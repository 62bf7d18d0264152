"""A teacher's outputs on disk: what is read back, what it takes, whose it is, and that a killed run loses a shard."""

import pytest
import torch

from compress import teacher_cache
from compress.data import windows_from
from compress.errors import CompressError
from compress.maths.divergence import top_k
from compress.teacher_cache import Kept, compact, default_folder, open_cache, restored, tokenizer_digest
from compress.testing import tiny_model, tiny_tokenizer, tiny_tokens

WINDOWS = windows_from(tiny_tokens(20, 16), None)
ME = {"teacher": "a", "tokenizer": "b"}


class Asked:
    """Counts forwards; stops like a killed process at forward number `dies_at`."""

    def __init__(self, dies_at=None):
        self.model, self.count, self.dies_at = tiny_model("llama"), 0, dies_at

    def __call__(self, batch):
        self.count += 1
        if self.count == self.dies_at:
            raise KeyboardInterrupt
        out = self.model(**batch, output_hidden_states=True)
        return out.logits, dict(enumerate(out.hidden_states[1:]))


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(teacher_cache, "SHARD_TOKENS", 6 * 16)


def _cache(folder, asked, kept=None, windows=WINDOWS, identity=ME):
    return open_cache(folder, identity, windows, kept or Kept(8, 96, (1.0, 2.0), (1,)), lambda: asked)


def test_what_is_read_is_what_the_teacher_said_to_the_precision_of_the_file(tmp_path):
    asked = Asked()
    cache = _cache(tmp_path, asked)
    logits, hidden = Asked()({"input_ids": WINDOWS.tokens})
    for window in (0, 5, 6, 19):
        taught = cache[window]
        torch.testing.assert_close(taught["hidden.1"].float(), hidden[1][window], rtol=1e-2, atol=1e-2)
        for temperature in (1.0, 2.0):
            found = restored(taught, cache.kept, temperature)
            expected = top_k(logits[window], 8, temperature)
            assert torch.equal(found.indices, expected.indices)
            torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=0, atol=3e-3)
            torch.testing.assert_close(found.log_tail, expected.log_tail, rtol=1e-5, atol=1e-5)
            mass = found.log_probs.exp().sum(-1) + found.log_tail.exp()
            torch.testing.assert_close(mass, torch.ones(16), rtol=0, atol=1e-5)


def test_with_the_whole_vocabulary_there_is_no_tail():
    logits = torch.randn(1, 3, 12)
    kept = Kept(99, 12)
    found = restored(compact(logits, {}, kept), kept, 1.0)
    expected = logits[0].log_softmax(-1).gather(-1, found.indices)
    torch.testing.assert_close(found.log_probs, expected, rtol=0, atol=3e-3)


@pytest.mark.parametrize("vocabulary", [65_536, 65_537, 151_936])
def test_indices_of_any_vocabulary_come_back_and_32_of_them_take_at_most_200_bytes_a_token(vocabulary):
    logits = torch.randn(1, 4, vocabulary)
    logits[:, :, -1] = 20.0
    kept = Kept(32, vocabulary)
    taught = compact(logits, {}, kept)
    assert torch.equal(restored(taught, kept, 1.0).indices, top_k(logits[0], 32).indices)
    size = sum(tensor.nbytes for tensor in taught.values()) / 4
    assert size == kept.bytes_per_token(64) <= 200


def test_a_warm_cache_asks_the_teacher_nothing(tmp_path):
    first = Asked()
    _cache(tmp_path, first)
    assert first.count == 4

    def never():
        raise AssertionError("the teacher is not wanted")

    open_cache(tmp_path, ME, WINDOWS, Kept(8, 96, (1.0, 2.0), (1,)), never)


@pytest.mark.parametrize(
    "other",
    [
        {"identity": {**ME, "teacher": "x"}}, {"identity": {**ME, "tokenizer": "x"}},
        {"windows": windows_from(tiny_tokens(20, 16, seed=1), None)}, {"kept": Kept(9, 96, (1.0, 2.0), (1,))},
        {"kept": Kept(8, 95, (1.0, 2.0), (1,))}, {"kept": Kept(8, 96, (1.0,), (1,))},
        {"kept": Kept(8, 96, (1.0, 2.0), (2,))},
    ],
)  # fmt: skip
def test_another_teacher_tokenizer_text_or_setting_has_a_cache_of_its_own(other, tmp_path):
    mine = _cache(tmp_path, Asked())
    asked = Asked()
    assert _cache(tmp_path, asked, **other).folder != mine.folder
    assert asked.count == 4


def test_a_killed_run_goes_on_with_the_next_shard_and_ends_with_the_same_files(tmp_path):
    whole = _cache(tmp_path / "whole", Asked())
    with pytest.raises(KeyboardInterrupt):
        _cache(tmp_path / "killed", Asked(dies_at=3))
    asked = Asked()
    killed = _cache(tmp_path / "killed", asked)
    assert asked.count == 2
    for file in whole.folder.glob("*.safetensors"):
        assert (killed.folder / file.name).read_bytes() == file.read_bytes()


def test_a_damaged_shard_is_named(tmp_path):
    folder = _cache(tmp_path, Asked()).folder
    shard = folder / "000001.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(CompressError, match=r"000001\.safetensors"):
        _cache(tmp_path, Asked())[7]


def test_the_cache_is_where_the_user_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "compress" / "teacher"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder().parts[-3:] == (".cache", "compress", "teacher")


def test_tokenizers_are_told_apart_by_what_they_do():
    same, other = tiny_tokenizer(), tiny_tokenizer()
    other.add_tokens(["zebra"])
    assert tokenizer_digest(same) == tokenizer_digest(tiny_tokenizer())
    assert tokenizer_digest(other) != tokenizer_digest(same)
