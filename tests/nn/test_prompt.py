"""Attention in blocks of queries and the head of one row, against what transformers computes without them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

import compress
from compress.nn import prompt
from compress.testing import save_tiny, tiny_model

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no instructions for bfloat16 here"
)
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 1024}


def texts(batch: int, heads: int, kept: int, length: int, size: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(batch, length, count, size) for count in (heads, kept, kept)]
    return [torch.randn(shape).bfloat16().transpose(1, 2) for shape in shapes]


@pytest.mark.parametrize("length", [96, 128, 300])
@pytest.mark.parametrize(("batch", "heads", "kept"), [(1, 4, 4), (2, 6, 2), (1, 3, 1)])
def test_attention_in_blocks_is_that_of_torch(batch: int, heads: int, kept: int, length: int) -> None:
    query, key, value = texts(batch, heads, kept, length, 16)
    found = prompt.causal(query, key, value, 0.25).float()
    wide = [x.float() for x in (query, key, value)]
    expected = functional.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True)
    # rounded three times to 8 bits: query, scores and shares
    assert (found - expected).abs().max() < 3 * 2**-8 * expected.abs().max()
    assert (found - expected).norm() < 2**-8 * expected.norm()


def test_few_scores_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = texts(1, 4, 2, 200, 16)
    expected = prompt.causal(query, key, value, 0.25)
    monkeypatch.setattr(prompt, "_MOST", 1 << 14)
    assert (prompt.causal(query, key, value, 0.25).float() - expected.float()).abs().max() < 0.02


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "phi3"])
def test_a_loaded_decoder_reads_a_prompt_as_transformers_does(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path, family, **({"n_positions": 512} if family == "gpt2" else SHAPE))
    quick = compress.load(tmp_path, dtype=torch.bfloat16)
    plain = type(quick).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    calls = []
    own = prompt.causal
    monkeypatch.setattr(prompt, "causal", lambda *given: calls.append(1) or own(*given))
    ids = (torch.arange(150) * 7 % 90 + 3)[None]
    with torch.inference_mode():
        found, expected = (
            model(input_ids=ids, logits_to_keep=1, use_cache=True).logits.float() for model in (quick, plain)
        )
    assert len(calls) == quick.config.num_hidden_layers
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_what_is_no_whole_causal_text_in_bfloat16_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(prompt, "causal", lambda *given: calls.append(1))
    module = torch.nn.Module()
    module.is_causal = True
    query, key, value = texts(1, 2, 2, 128, 8)
    mask = torch.ones(1, 1, 128, 128, dtype=torch.bool).tril()
    prompt.attend(module, query, key, value, mask)
    prompt.attend(module, query, key, value, None, is_causal=False)
    prompt.attend(module, query[:, :, :64], key[:, :, :64], value[:, :, :64], None)
    prompt.attend(module, query[:, :, :100], key, value, None)
    prompt.attend(module, query.float(), key.float(), value.float(), None)
    prompt.attend(module, query.requires_grad_(), key, value, None)
    module.is_causal = False
    prompt.attend(module, query.detach(), key, value, None)
    assert not calls
    module.is_causal = True
    with pytest.raises(AttributeError):  # served, by what stands in for `causal` and returns None
        prompt.attend(module, query.detach(), key, value, None)
    assert calls == [1]


def test_the_head_gets_one_row_whose_strides_are_its_own() -> None:
    text = torch.randn(1, 10, 4)
    (row,) = prompt._one_row(torch.nn.Linear(4, 3), (text[:, -1:],)) or (None,)
    assert row is not None
    assert row.stride() == (4, 4, 1)
    assert torch.equal(row, text[:, -1:])
    assert prompt._one_row(torch.nn.Linear(4, 3), (text,)) is None


def test_a_folder_saved_from_a_quick_model_says_nothing_of_it(tmp_path: Path) -> None:
    save_tiny(tmp_path / "a", "llama", **SHAPE)
    quick = compress.load(tmp_path / "a", dtype=torch.bfloat16)
    assert quick.config._attn_implementation == prompt.NAME
    quick.save_pretrained(tmp_path / "b")
    assert prompt.NAME not in (tmp_path / "b" / "config.json").read_text()
    again = type(quick).from_pretrained(tmp_path / "b")
    assert again.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_keep_the_attention_of_torch(dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    assert not prompt.use_quick_prompts(model)
    assert model.config._attn_implementation == "sdpa"


def test_without_onednn_nothing_is_asked_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.delattr(torch.ops, "mkldnn")
    model = tiny_model("llama").to(torch.bfloat16)
    assert not prompt.use_quick_prompts(model)
    assert model.config._attn_implementation == "sdpa"


def test_encoders_keep_the_attention_of_torch() -> None:
    for family in ("bert", "t5"):
        model = tiny_model(family).to(torch.bfloat16)
        assert not prompt.use_quick_prompts(model)
