"""The engine: order, memory, resumption, coverage."""

import pytest
import torch

from compress.checkpoint import TensorSource
from compress.data import windows_from
from compress.errors import CompressError, StartError
from compress.maths.grid import spec_for
from compress.maths.hessian import Hessian
from compress.model import ModelHandle
from compress.opening import open_model
from compress.passes.base import Context
from compress.passes.gptq import GPTQ, gptq
from compress.passes.rtn import RTN
from compress.passes.wanda import Wanda
from compress.testing import outputs, tiny_model, tiny_tokens
from compress.walk import walk
from compress.workspace import Stage

TOKENS = tiny_tokens(samples=6, length=24)
STAGES = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]


def naive_gptq(model, tokens, pass_):
    """GPTQ by whole forwards of the whole model, a stage at a time: no stream, no blocks, hooks alone."""
    codes = {}
    for index, block in enumerate(model.model.layers):
        for stage in STAGES:
            first = block.get_submodule(stage[0])
            hessian = Hessian(first.in_features, "cpu")
            hook = first.register_forward_pre_hook(
                lambda _, args, h=hessian: h.add(args[0].reshape(-1, args[0].shape[-1]))
            )
            for batch in tokens.split(2):
                outputs(model, batch)
            hook.remove()
            for name in stage:
                layer = block.get_submodule(name)
                spec = spec_for(layer.weight.dtype, pass_.bits, pass_.group_size, pass_.symmetric)
                result = gptq(
                    layer.weight.detach(), hessian.matrix, spec, pass_.act_order, pass_.damping, pass_.block_size,
                    pass_.search,
                )  # fmt: skip
                from compress.maths.grid import dequantize

                with torch.no_grad():
                    layer.weight.copy_(dequantize(result.codes, result.scale, result.zero, spec, layer.weight.dtype))
                codes[f"model.layers.{index}.{name}"] = result.codes
    return codes


def test_gptq_by_the_engine_has_the_codes_of_a_naive_loop_over_the_whole_model():
    pass_ = GPTQ(bits=3, group_size=16, true_sequential=True)
    expected = naive_gptq(tiny_model("llama"), TOKENS, pass_)
    model = tiny_model("llama")
    walk(pass_, ModelHandle.wrap(model), Context(calibration=windows_from(TOKENS, None), tokens_per_batch=48))
    for name, codes in expected.items():
        assert torch.equal(model.get_submodule(name).codes()[0], codes), name


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama", num_hidden_layers=4).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(folder, stage_folder, residency, pass_=None):
    handle = open_model(folder, residency=residency)
    context = Context(calibration=windows_from(TOKENS, None), stage=Stage(stage_folder), tokens_per_batch=48)
    result = walk(pass_ or GPTQ(bits=4, group_size=16), handle, context)
    return handle, result


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_both_residencies_write_the_same_bytes(folder, tmp_path):
    run(folder, tmp_path / "a", "memory")
    run(folder, tmp_path / "b", "disk")
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_with_residency_disk_one_block_at_most_is_in_memory(folder, tmp_path, monkeypatch):
    live = []
    original = ModelHandle.load

    def load(self, block):
        loaded = original(self, block)
        held = [b for b in self.block_list() if any(p.device.type != "meta" for p in b.module.parameters())]
        live.append((self.live_blocks, len(held)))
        return loaded

    monkeypatch.setattr(ModelHandle, "load", load)
    handle, _ = run(folder, tmp_path / "stage", "disk")
    assert len(live) >= len(handle.block_list())
    assert set(live) == {(1, 1)}
    assert handle.live_blocks == 0


def test_a_pass_after_another_on_disk_starts_from_what_the_first_left(folder, tmp_path):
    handle, _ = run(folder, tmp_path / "wanda", "disk", Wanda(sparsity=0.5))
    handle.latest = Stage(tmp_path / "wanda")
    handle.record(Wanda(sparsity=0.5))
    context = Context(calibration=windows_from(TOKENS, None), stage=Stage(tmp_path / "rtn"))
    walk(RTN(bits=8, group_size=16), handle, context)
    block = handle.block_list()[2]
    stage = Stage(tmp_path / "rtn")
    handle.latest = stage
    layer = handle.load(block).module.get_submodule("mlp.up_proj")
    assert (layer.codes()[0] == 0).float().mean() >= 0.5


def test_a_walk_that_stopped_half_way_continues_to_the_same_bytes(folder, tmp_path):
    run(folder, tmp_path / "whole", "memory")
    for residency in ("memory", "disk"):
        part = tmp_path / f"part-{residency}"
        run(folder, part, residency)
        for index in (2, 3):
            (part / f"model.layers.{index}.json").unlink()
            (part / f"model.layers.{index}.safetensors").unlink()
        _, result = run(folder, part, residency)
        assert content(part) == content(tmp_path / "whole")
        assert len(result.blocks) == 4


def test_finished_blocks_are_not_compressed_again(folder, tmp_path, monkeypatch):
    run(folder, tmp_path / "stage", "memory")
    (tmp_path / "stage" / "model.layers.3.json").unlink()
    names = []
    original = GPTQ.compress_block
    monkeypatch.setattr(GPTQ, "compress_block", lambda self, b, c: names.append(b.name) or original(self, b, c))
    run(folder, tmp_path / "stage", "memory")
    assert names == ["model.layers.3"]


def test_coverage_below_the_least_fails_and_names_what_was_left_out():
    handle = ModelHandle.wrap(tiny_model("gpt_oss"))
    with pytest.raises(CompressError, match=r"only 11%.*mlp\.experts\.gate_up_proj") as caught:
        walk(RTN(group_size=16), handle, Context(min_coverage=0.5))
    assert caught.value.exit_code == 1


def test_coverage_counts_the_matrix_weights_that_were_changed():
    model = tiny_model("llama")
    result = RTN(group_size=16, skip=("mlp.*",))(model, min_coverage=0.0)
    block = tiny_model("llama").model.layers[0]
    attention = sum(p.numel() for p in block.self_attn.parameters())
    assert result.coverage == pytest.approx(attention / (attention + sum(p.numel() for p in block.mlp.parameters())))


def test_targets_that_name_no_layer_are_refused_with_the_names_there_are():
    with pytest.raises(StartError, match=r"self_attn\.q_proj"):
        RTN(group_size=16, targets=("nothing",))(tiny_model("llama"))


def test_weights_of_a_stage_are_read_back_equal(folder, tmp_path):
    handle, _ = run(folder, tmp_path / "stage", "memory")
    block = handle.block_list()[1]
    source = TensorSource.of_file(tmp_path / "stage" / "model.layers.1.safetensors")
    for name, tensor in block.state().items():
        assert torch.equal(source.read(name), tensor), name


def test_a_second_rounding_is_refused():
    model = tiny_model("llama")
    RTN(group_size=16)(model)
    with pytest.raises(StartError, match="quantized"):
        RTN(group_size=16)(model)
