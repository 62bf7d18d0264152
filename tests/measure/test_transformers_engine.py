"""The engine over transformers writes what `generate` writes, tells what a model computes, and counts what it reads."""

import numpy as np
import pytest
import torch
from torch import nn

from compress.errors import CompressError
from compress.measure.runtimes import Transformers
from compress.measure.transformers_engine import TransformersEngine, bytes_read
from compress.nn.quant_cache import CacheSpec, use_packed_cache
from compress.testing import CAUSAL, save_tiny, tiny_model


def written(engine, prompts, tokens):
    engine.prefill(prompts)
    rows = [engine.step() for _ in range(tokens)]
    return [list(row) for row in zip(*rows, strict=True)]


@pytest.mark.parametrize("family", CAUSAL)
def test_it_writes_what_generate_writes_row_by_row(family):
    model = tiny_model(family).eval()
    prompts = [[5, 9, 30, 7, 12], [40, 3, 3, 8, 21]]
    ids = torch.tensor(prompts)
    wanted = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0,
        suppress_tokens=None, eos_token_id=None,
    )  # fmt: skip
    assert written(TransformersEngine(model), prompts, 6) == wanted[:, 5:].tolist()


def test_an_encoder_decoder_writes_what_generate_writes():
    model = tiny_model("t5").eval()
    ids = torch.tensor([[5, 9, 30, 7]])
    wanted = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, eos_token_id=None)
    engine = TransformersEngine(model)
    assert written(engine, ids.tolist(), 4) == wanted[:, 1:].tolist()
    assert engine.logits([1, 2]) is None


def test_its_logits_are_the_models_and_leave_the_cache_empty():
    model = tiny_model("llama").eval()
    engine = TransformersEngine(model)
    engine.prefill([[4, 5]])
    found = engine.logits([4, 5, 6])
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([[4, 5, 6]])).logits[0]
    assert found.dtype == np.float32
    assert np.array_equal(found, wanted.numpy())
    assert engine.cache_bytes() is None
    with pytest.raises(CompressError, match="read a prompt"):
        engine.step()


@pytest.mark.parametrize("spec", [None, CacheSpec(bits=8, group_size=8, residual_length=8)])
def test_the_cache_is_counted_as_it_is_held(spec):
    model = tiny_model("llama").eval()
    use_packed_cache(model, spec)
    engine = TransformersEngine(model)
    engine.prefill([[5] * 24])
    config, layers = model.config, model.config.num_hidden_layers
    width, heads = config.hidden_size // config.num_attention_heads, config.num_key_value_heads
    dense = layers * 2 * heads * width * 4  # keys and values, float32
    if spec is None:
        assert engine.cache_bytes() == 24 * dense
        engine.step()
        assert engine.cache_bytes() == 24 * dense  # the first token was not read yet
        engine.step()
        assert engine.cache_bytes() == 25 * dense
    else:
        packed = layers * spec.bytes_per_token(heads, width)
        assert engine.cache_bytes() == 16 * packed + 8 * dense


def test_an_encoder_reads_and_does_not_write():
    engine = TransformersEngine(tiny_model("bert").eval())
    engine.prefill([[3, 4, 5]])
    assert not engine.generates
    with pytest.raises(CompressError, match="read a prompt"):
        engine.step()


def test_bytes_of_a_step_are_all_weights_but_the_table_that_is_no_head():
    for tied in (True, False):
        model = tiny_model("llama", tie_word_embeddings=tied)
        counted = {id(p): p.numel() * 4 for p in model.parameters()}
        table = model.get_input_embeddings().weight
        rest = sum(b.numel() * b.element_size() for b in model.buffers())
        wanted = sum(counted.values()) - (0 if tied else table.numel() * 4)
        assert bytes_read(model) == wanted + rest


def test_of_experts_the_share_that_a_token_uses_is_counted():
    model = nn.Module()
    model.mlp = nn.Module()
    model.mlp.experts = nn.Linear(10, 4, bias=False)
    model.other = nn.Linear(10, 1, bias=False)
    model.can_generate = lambda: False
    model.get_output_embeddings = lambda: None
    model.config = type("Config", (), {"num_experts_per_tok": 2, "num_local_experts": 8})()
    model.config.get_text_config = lambda: model.config
    assert bytes_read(model) == 160 // 4 + 40


def test_the_runtime_opens_a_folder_as_an_engine(tmp_path):
    folder = save_tiny(tmp_path / "tiny")
    runtime = Transformers()
    engine = runtime.open(folder, threads=1, device="cpu")
    assert (runtime.exports, runtime.missing(), engine.runtime) == ((), None, "transformers")
    assert engine.context == engine.model.config.max_position_embeddings
    assert len(written(engine, [[3, 4]], 3)[0]) == 3
    engine.close()
