"""The calibration stream against what the whole model computes."""

import pytest
import torch
from torch import nn

from compress.calibration import BlockCalibration
from compress.data import windows_from
from compress.errors import StartError
from compress.images import windows_given
from compress.model import ModelHandle
from compress.stream import CalibrationStream, stream_outputs
from compress.testing import FAMILIES, outputs, tiny_inputs, tiny_model, tiny_tokens

TOKENS = tiny_tokens(samples=5, length=24)
PER_BATCH = 48  # two windows a batch, and a last batch of one


@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_block_by_block_gives_the_models_own_outputs_to_the_last_bit(family):
    model = tiny_model(family)
    inputs = tiny_inputs(family, samples=5, length=24)
    windows = windows_given(inputs, model.config)
    expected = torch.cat([outputs(model, batch) for batch in inputs.split(2)])
    streamed = stream_outputs(ModelHandle.wrap(model), windows, 2 * windows.length)
    assert torch.equal(streamed, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "bert"])
def test_observed_inputs_are_those_the_layer_gets_in_the_whole_model(family):
    model = tiny_model(family)
    handle = ModelHandle.wrap(model)
    stream = CalibrationStream(handle, windows_from(TOKENS, None), PER_BATCH)
    first, second = handle.block_list()[:2]
    stream.advance(first)
    name = list(second.layers())[-1]
    seen = []
    calibration = BlockCalibration(second, stream)
    calibration.stages([name])
    calibration.observe({name: lambda x: seen.append(x.clone())})
    expected = []
    hook = second.module.get_submodule(name).register_forward_pre_hook(
        lambda _, args: expected.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    for batch in TOKENS.split(2):
        outputs(model, batch)
    hook.remove()
    assert torch.equal(torch.cat(seen), torch.cat(expected))


def test_layers_that_share_an_input_form_one_stage_in_the_order_of_their_call():
    handle = ModelHandle.wrap(tiny_model("llama"))
    block = handle.block_list()[0]
    calibration = BlockCalibration(block, CalibrationStream(handle, windows_from(TOKENS, None)))
    stages = calibration.stages(list(block.layers()))
    assert stages == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]


def test_a_layer_that_no_token_reaches_is_named_silent_and_not_waited_for():
    handle = ModelHandle.wrap(tiny_model("llama"))
    block = handle.block_list()[0]
    block.module.unused = nn.Linear(4, 4)
    calibration = BlockCalibration(block, CalibrationStream(handle, windows_from(TOKENS, None)))
    calibration.stages(list(block.layers()))
    seen = []
    calibration.observe({"unused": seen.append, "mlp.down_proj": seen.append})
    assert calibration.silent == ("unused",)
    assert sum(len(x) for x in seen) == TOKENS.numel()


def test_the_error_of_a_block_is_zero_unchanged_and_one_when_its_output_vanishes():
    handle = ModelHandle.wrap(tiny_model("llama"))
    block = handle.block_list()[0]
    calibration = BlockCalibration(block, CalibrationStream(handle, windows_from(TOKENS, None)))
    assert calibration.error() == 0.0
    block.module.forward = lambda hidden, **_: torch.zeros_like(hidden)
    assert calibration.error() == pytest.approx(1.0)


def test_a_model_that_works_between_its_blocks_is_refused():
    model = tiny_model("llama")
    inner = model.model

    def forward(input_ids=None, **kwargs):
        hidden = inner.embed_tokens(input_ids)
        tables = inner.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
        for layer in inner.layers:
            hidden = layer(hidden, position_embeddings=tables) * 2
        return hidden

    inner.forward = forward
    with pytest.raises(StartError, match="works between its blocks"):
        CalibrationStream(ModelHandle.wrap(model), windows_from(TOKENS, None))


def test_capture_leaves_the_models_blocks_in_place():
    model = tiny_model("gemma3")
    before = list(model.model.layers)
    CalibrationStream(ModelHandle.wrap(model), windows_from(TOKENS, None))
    assert all(a is b for a, b in zip(before, model.model.layers, strict=True))


def test_batches_that_are_called_alike_share_their_tables():
    handle = ModelHandle.wrap(tiny_model("llama"))
    stream = CalibrationStream(handle, windows_from(TOKENS[:4], None), PER_BATCH)
    first, second = (calls[0].kwargs["position_embeddings"] for calls in stream.calls)
    assert first[0] is second[0]


def test_padding_is_not_observed():
    from dataclasses import replace

    handle = ModelHandle.wrap(tiny_model("llama"))
    windows = windows_from(TOKENS, None)
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    mask[:, 20:] = False
    stream = CalibrationStream(handle, replace(windows, mask=mask), PER_BATCH)
    block = handle.block_list()[0]
    calibration = BlockCalibration(block, stream)
    calibration.stages(["mlp.down_proj"])
    seen = []
    calibration.observe({"mlp.down_proj": seen.append})
    assert sum(len(x) for x in seen) == mask.sum()
