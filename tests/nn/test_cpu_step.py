"""A block's step for one token, against the block itself; and what must go through the block."""

from __future__ import annotations

import copy

import pytest
import torch

import compress
from compress.maths.grid import QuantSpec, find_params, quantize
from compress.nn import cpu
from compress.nn.cpu_step import BlockStep, use_block_steps
from compress.nn.quant_linear import QuantLinear
from compress.testing import tiny_model

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="the kernel is not built here")
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 1024}


def pair(
    family: str = "llama", dtype: torch.dtype = torch.float32, bits: int = 4, group: int = 32, **shape: object
):  # fmt: skip
    """The same packed model twice: without and with steps."""
    model = tiny_model(family, **{**SHAPE, **shape}).to(dtype)
    compress.RTN(bits=bits, group_size=group)(model)
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            layer.exact = False
    other = copy.deepcopy(model)
    return model, other, use_block_steps(other)


def steps(model) -> list[BlockStep]:
    return [module.forward for module in model.modules() if isinstance(module.__dict__.get("forward"), BlockStep)]


@torch.inference_mode()
def written(model, prompt: int = 5, new: int = 6) -> torch.Tensor:
    """Logits of single tokens after a prompt, [new, vocabulary]; the same tokens whatever the model says."""
    ids = (torch.arange(prompt + new) * 7 % 90 + 3)[None]
    out = model(input_ids=ids[:, :prompt], use_cache=True)
    logits = []
    for at in range(prompt, prompt + new):
        out = model(input_ids=ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[0, -1].float())
    return torch.stack(logits)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_step_gives_what_the_blocks_give(family: str, dtype: torch.dtype, most: float) -> None:
    shape = {"sliding_window": None} if family == "mistral" else {}
    plain, stepping, count = pair(family, dtype, **shape)
    assert count == 2
    assert off(written(stepping), written(plain)) < most
    assert [step.proved for step in steps(stepping)] == [True, True]


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_layers_of_other_bits_and_of_several_in_one_block_are_served(bits: int) -> None:
    plain, stepping, _ = pair(bits=bits)
    assert off(written(stepping), written(plain)) < 1e-5
    mixed = pair()[0]
    for name, layer in list(mixed.named_modules()):
        if name.endswith(("k_proj", "up_proj", "down_proj")):
            spec = QuantSpec(bits, 32, symmetric=False)
            scale, zero = find_params(layer.dequantize(), spec)
            codes = quantize(layer.dequantize(), scale, zero, spec)
            mixed.set_submodule(name, QuantLinear.from_codes(codes, scale, zero, spec))
            mixed.get_submodule(name).exact = False
    expected = written(mixed)
    assert use_block_steps(mixed) == 2
    assert off(written(mixed), expected) < 1e-5
    assert all(step.proved for step in steps(mixed))


@pytest.mark.skipif(cpu.why_not_int8() is not None, reason="no AVX-512 VNNI")
def test_inputs_in_int8_are_rounded_in_a_step_as_layer_by_layer() -> None:
    plain, stepping, _ = pair(group=64, hidden_size=128, intermediate_size=192)
    floats = written(plain)
    for model in (plain, stepping):
        for layer in model.modules():
            if isinstance(layer, QuantLinear):
                layer.int8_inputs = True
    found, expected = written(stepping), written(plain)
    assert all(step.proved and step.prepared.step.int8 for step in steps(stepping))
    assert off(found, expected) < 2e-3 < off(found, floats) < 0.05


def test_with_avx2_alone_a_step_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, stepping, _ = pair(hidden_size=128, intermediate_size=192)
    monkeypatch.setattr(cpu, "LEVELS", {1: "AVX2"})
    assert off(written(stepping), written(plain)) < 1e-5
    assert all(step.proved and step.prepared.step.at_most == 1 for step in steps(stepping))


def test_biases_are_added() -> None:
    plain, stepping, _ = pair(attention_bias=True, mlp_bias=True)
    for model in (plain, stepping):
        torch.manual_seed(1)
        for layer in model.modules():
            if isinstance(layer, QuantLinear):
                layer.bias.data.normal_()
    assert off(written(stepping), written(plain)) < 1e-5
    assert all(step.proved for step in steps(stepping))


def test_the_room_of_keys_and_values_grows_and_generation_is_the_same() -> None:
    plain, stepping, _ = pair()
    ids = torch.arange(3, 12)[None]
    options = {"max_new_tokens": 300, "min_new_tokens": 300, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(stepping.generate(ids, **options), plain.generate(ids, **options))
    cache = stepping(input_ids=ids, use_cache=True).past_key_values
    with torch.inference_mode():
        stepping(input_ids=ids[:, :1], past_key_values=cache)
        stepping(input_ids=ids[:, :1], past_key_values=cache)
        before = cache.layers[0].keys.clone()
        cache.crop(-1)  # the room is not the cache's any more
        stepping(input_ids=ids[:, 1:2], past_key_values=cache)
    assert cache.get_seq_length() == before.shape[2]
    assert torch.equal(cache.layers[0].keys[:, :, :-1], before[:, :, :-1])
    assert not torch.equal(cache.layers[0].keys[:, :, -1], before[:, :, -1])


def test_the_number_of_threads_changes_no_bit() -> None:
    _, stepping, _ = pair(dtype=torch.bfloat16)
    written(stepping)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append([step.prepared for step in steps(stepping)] and written(stepping))
    finally:
        torch.set_num_threads(before)
    assert off(results[1], results[0]) < 2e-2  # the prompt is torch's


def test_several_texts_masks_and_listeners_go_through_the_block() -> None:
    plain, stepping, _ = pair()
    ids = torch.arange(3, 9)[None].repeat(2, 1)
    padded = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]), "pad_token_id": 0}
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(stepping.generate(ids, **padded, **options), plain.generate(ids, **padded, **options))
    assert all(step.proved is None for step in steps(stepping))
    written(stepping)
    heard = []
    stepping.model.layers[0].mlp.down_proj.register_forward_hook(lambda *args: heard.append(1))
    written(stepping, new=2)
    assert len(heard) == 3


def test_what_a_layer_is_given_anew_is_used() -> None:
    plain, stepping, _ = pair()
    written(stepping)
    other = pair(bits=4, initializer_range=0.1)[0]
    plain.load_state_dict(other.state_dict(), assign=True)
    stepping.load_state_dict(other.state_dict(), assign=True)
    assert off(written(stepping), written(plain)) < 1e-5
    copied = copy.deepcopy(stepping).to(torch.bfloat16)
    assert off(written(copied), written(copy.deepcopy(plain).to(torch.bfloat16))) < 2e-2
    assert steps(copied)[0].block is copied.model.layers[0]


def test_a_block_that_computes_something_else_is_left_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, stepping, _ = pair()
    kind = type(plain.model.layers[0])
    real = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x, **kwargs: real(self, x, **kwargs) * 1.01)
    assert torch.equal(written(stepping), written(plain))
    assert [step.proved for step in steps(stepping)] == [False, False]


@pytest.mark.parametrize("family", ["gemma3", "phi3", "gpt2", "opt", "gpt_neox"])
def test_blocks_built_otherwise_are_not_taken(family: str) -> None:
    assert use_block_steps(tiny_model(family)) == 0
