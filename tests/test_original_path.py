"""The second path through the model: what each block is given, and gives, before a pass changes anything."""

import pytest
import torch

from compress.calibration import BlockCalibration
from compress.data import windows_from
from compress.model import ModelHandle
from compress.opening import open_model
from compress.passes.base import Context
from compress.passes.gptq import GPTQ
from compress.passes.rtn import RTN
from compress.passes.wanda import Wanda
from compress.shapes import ModelShape
from compress.stream import CalibrationStream
from compress.testing import outputs, tiny_model, tiny_tokens
from compress.walk import walk
from compress.workspace import Stage

TOKENS = tiny_tokens(samples=5, length=24)
PER_BATCH = 48  # two windows a batch, and a last batch of one
SEEN = {}


class Watcher(RTN):
    """Rounds, and notes for each block what it saw of both paths; `SEEN`: the block's name -> tensors by name."""

    name = "watcher"
    needs_calibration = True

    @property
    def needs_original(self):
        return True

    def compress_block(self, block, calibration):
        names = list(block.layers())
        seen = {"in": torch.cat(list(calibration.original_inputs()))}
        metrics = super().compress_block(block, None)  # before the pairs are asked for: the copy must not change
        calibration.stages(names)
        pairs = {name: ([], []) for name in names}
        calibration.observe_pairs(
            {name: lambda x, y, p=pairs[name]: (p[0].append(x.clone()), p[1].append(y.clone())) for name in names}
        )
        for name, (now, before) in pairs.items():
            seen |= {f"{name} now": torch.cat(now), f"{name} original": torch.cat(before)}
        seen["out"] = torch.cat(list(calibration.original_outputs()))
        seen["out again"] = torch.cat(list(calibration.original_outputs()))
        SEEN[block.name] = seen
        return metrics


@pytest.fixture(autouse=True)
def _forget():
    SEEN.clear()


def context(**values):
    return Context(calibration=windows_from(TOKENS, None), tokens_per_batch=PER_BATCH, **values)


def watched(model, **values):
    """What `Watcher` sees of a model or a handle."""
    handle = model if isinstance(model, ModelHandle) else ModelHandle.wrap(model)
    walk(Watcher(group_size=16), handle, context(**values))
    return dict(SEEN)


def whole(model, mask=None):
    """By hooks on a whole model: inputs and outputs of its blocks, and the inputs of their layers [tokens, in]."""
    handle, seen, hooks = ModelHandle.wrap(model), {}, []
    for block in handle.block_list():
        mine = seen[block.name] = {}

        def note(_, args, out, mine=mine):
            mine.setdefault("in", []).append(args[0])
            mine.setdefault("out", []).append(out[0] if isinstance(out, tuple) else out)

        hooks.append(block.module.register_forward_hook(note))
        for name, layer in block.layers().items():
            hooks.append(
                layer.module.register_forward_pre_hook(
                    lambda _, args, mine=mine, name=name: mine.setdefault(name, []).append(args[0].flatten(0, -2))
                )
            )
    for batch in TOKENS.split(2):
        outputs(model, batch)
    for hook in hooks:
        hook.remove()
    return {block: {name: torch.cat(tensors) for name, tensors in mine.items()} for block, mine in seen.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "bert"])
def test_the_original_path_is_that_of_the_whole_model_before_the_pass(family):
    expected = whole(tiny_model(family))
    for block, seen in watched(tiny_model(family)).items():
        for name, tensor in expected[block].items():
            key = name if name in ("in", "out") else f"{name} original"
            assert torch.equal(seen[key], tensor), (block, name)
        assert torch.equal(seen["out again"], seen["out"])


def test_the_path_as_it_is_now_stands_beside_it_token_by_token():
    model = tiny_model("llama")
    rounded = tiny_model("llama")
    seen = watched(model)
    RTN(group_size=16)(rounded)
    with torch.no_grad():  # the same weights in dense layers, whose arithmetic is that of the walk
        plain = tiny_model("llama")
        for name, parameter in plain.named_parameters():
            packed = rounded.get_submodule(name.rpartition(".")[0])
            if hasattr(packed, "dequantize"):
                parameter.copy_(packed.dequantize(parameter.dtype))
    expected = whole(plain)
    for block, tensors in expected.items():
        for name in set(tensors) - {"in", "out"}:
            assert torch.equal(seen[block][f"{name} now"], tensors[name]), (block, name)
            assert not torch.equal(seen[block][f"{name} now"], seen[block][f"{name} original"]) or name.endswith(
                ("q_proj", "k_proj", "v_proj")
            )


def test_padding_is_in_neither_of_a_pair():
    from dataclasses import replace

    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    mask[1, 20:] = mask[3, 7:] = False
    windows = replace(windows_from(TOKENS, None), mask=mask)
    handle = ModelHandle.wrap(tiny_model("llama"))
    stream = CalibrationStream(handle, windows, PER_BATCH, original=True)
    for block in handle.block_list():
        calibration = BlockCalibration(block, stream)
        calibration.stages(["mlp.down_proj"])
        pairs = []
        calibration.observe_pairs({"mlp.down_proj": lambda x, y, pairs=pairs: pairs.append((x, y))})
        assert sum(len(x) for x, _ in pairs) == sum(len(y) for _, y in pairs) == mask.sum()
        assert all(torch.equal(x, y) for x, y in pairs)  # nothing was changed
        assert not calibration.unpaired
        calibration.finish()


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("residency", ["memory", "disk"])
def test_a_continued_walk_sees_the_same_paths(residency, folder, tmp_path):
    first = watched(open_model(folder, residency=residency), stage=Stage(tmp_path / "stage"))
    (tmp_path / "stage" / "model.layers.2.json").unlink()
    SEEN.clear()
    again = watched(open_model(folder, residency=residency), stage=Stage(tmp_path / "stage"))
    assert list(again) == ["model.layers.2"]
    for name, tensor in again["model.layers.2"].items():
        assert torch.equal(tensor, first["model.layers.2"][name]), name


@pytest.mark.parametrize("residency", ["memory", "disk"])
def test_for_a_pass_after_another_the_original_is_what_the_first_one_left(residency, folder, tmp_path):
    pruned = tiny_model("llama")
    walk(Wanda(), ModelHandle.wrap(pruned), context())
    expected = whole(pruned)
    handle = open_model(folder, residency=residency)
    walk(Wanda(), handle, context(stage=Stage(tmp_path / "wanda")))
    handle.latest = Stage(tmp_path / "wanda")
    handle.record(Wanda())
    for block, seen in watched(handle, stage=Stage(tmp_path / "watched")).items():
        assert torch.equal(seen["out"], expected[block]["out"])


def calibration_of(original):
    handle = ModelHandle.wrap(tiny_model("llama"))
    block = handle.block_list()[0]
    return block, BlockCalibration(block, CalibrationStream(handle, windows_from(TOKENS, None), PER_BATCH, original))


def test_a_pass_that_did_not_ask_for_the_original_is_told_so():
    calibration = calibration_of(False)[1]
    for ask in (calibration.original_inputs, calibration.original_outputs):
        with pytest.raises(RuntimeError, match="needs_original"):
            next(ask())
    with pytest.raises(RuntimeError, match="needs_original"):
        calibration.observe_pairs({})


def test_original_inputs_after_the_outputs_are_refused():
    calibration = calibration_of(True)[1]
    list(calibration.original_outputs())
    with pytest.raises(RuntimeError, match="before its outputs"):
        next(calibration.original_inputs())


def test_batches_come_with_their_calls_and_both_blocks_can_be_run_on_them():
    block, calibration = calibration_of(True)
    expected = list(calibration.original_outputs())
    block.layers()["mlp.down_proj"].set_weight(torch.zeros(32, 64))
    for (hidden, call, mask), output in zip(calibration.batches(), expected, strict=True):
        assert mask is None
        assert torch.equal(calibration.original_forward(hidden, call), output)
        assert not torch.equal(calibration.forward(hidden, call), output)


def test_a_layer_that_gets_other_tokens_on_the_two_paths_is_named_and_paired_with_itself():
    block, calibration = calibration_of(True)
    layer = block.module.mlp.down_proj
    calibration.stages(["mlp.up_proj", "mlp.down_proj"])
    block.module.mlp.forward = lambda x: block.module.mlp.up_proj(x)[..., :32] + layer(x.repeat(1, 1, 2)[:, :9])[:, :1]
    pairs = []
    calibration.observe_pairs({"mlp.up_proj": lambda x, y: None, "mlp.down_proj": lambda x, y: pairs.append((x, y))})
    assert calibration.unpaired == {"mlp.down_proj"}
    assert pairs
    assert all(x is y for x, y in pairs)


def test_finishing_a_block_gives_its_error_and_moves_both_paths():
    block, calibration = calibration_of(True)
    expected = list(calibration.original_outputs())
    block.layers()["mlp.down_proj"].set_weight(torch.zeros(32, 64))
    error = calibration.error()
    now = [calibration.forward(hidden, call) for hidden, call, _ in calibration.batches()]
    assert calibration.finish() == error > 0
    assert all(torch.equal(a, b) for a, b in zip(calibration.stream.hidden, now, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(calibration.stream.original, expected, strict=True))


def test_the_plan_counts_the_second_hidden_states_and_the_copy_of_the_block():
    from compress import costs

    shape = ModelShape(tiny_model("llama"), torch.float32)
    holding, text = costs.Holding(False, torch.float32), costs.Text(8, 32)
    plain = costs.one_pass(GPTQ(group_size=16), shape, holding, text)
    both = costs.one_pass(Watcher(group_size=16), shape, holding, text)
    added = {name: size for name, size in both.items() if name not in plain}
    assert added == {"original hidden states": 8 * 32 * 32 * 4, "original block": both["block"]}
