import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import compress
from compress.errors import StartError
from compress.pipeline import run
from compress.recipe import Recipe
from compress.testing import outputs, save_tiny, tiny_model, tiny_tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("depth") / "model", num_hidden_layers=4)


def _values(folder, output, **changes):
    return {
        "model": str(folder), "output": str(output), "benchmark": False, "passes": [{"depth": {"layers": 2}}],
        "data": {"calibration": {"source": str(folder.parent / "text.txt"), "samples": 4, "length": 16}}, **changes,
    }  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def text(folder):
    (folder.parent / "text.txt").write_text("The cat sat on the mat and saw the rat. " * 20)


def test_the_blocks_that_stay_compute_what_they_did():
    model, before = tiny_model("gemma3"), tiny_model("gemma3")
    compress.Depth(drop=[0])(model)
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    del before.model.layers[0]
    before.config.layer_types = model.config.layer_types
    before.config.num_hidden_layers = 2
    for index, layer in enumerate(before.model.layers):
        layer.self_attn.layer_idx = index
    assert torch.equal(outputs(model, tiny_tokens()), outputs(before, tiny_tokens()))


def test_a_block_that_does_nothing_goes_first():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    before = outputs(model, tiny_tokens())
    result = compress.Depth(layers=2)(model, calibration=tiny_tokens())
    assert result.measurements["kept"] == [0, 2]
    assert torch.equal(outputs(model, tiny_tokens()), before)


@pytest.mark.parametrize("residency", ["memory", pytest.param("disk", marks=pytest.mark.slow)])
def test_the_folder_of_a_run_is_a_plain_model_with_fewer_blocks(folder, tmp_path, residency):
    run(_values(folder, tmp_path / "out", residency=residency))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert model.config.num_hidden_layers == len(model.model.layers) == 2


@pytest.mark.parametrize("residency", [pytest.param("memory", marks=pytest.mark.slow), "disk"])
def test_a_run_killed_after_it_ends_with_the_same_bytes(folder, tmp_path, residency, monkeypatch, unverified):
    passes = [{"depth": {"layers": 2}}, {"rtn": {"bits": 4, "group_size": 16}}]
    run(_values(folder, tmp_path / "whole", passes=passes, residency=residency))

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    for where in ("compress.passes.rtn.RTN.compress_block", "compress.pipeline._export"):
        with monkeypatch.context() as patch:
            patch.setattr(where, fail)
            with pytest.raises(KeyboardInterrupt):
                run(_values(folder, tmp_path / "killed", passes=passes, residency=residency))
    run(_values(folder, tmp_path / "killed", passes=passes, residency=residency))
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_plan_foresees_the_size_of_the_files(folder, tmp_path, unverified):
    values = _values(
        folder, tmp_path / "out", passes=[{"depth": {"layers": 2}}, {"rtn": {"bits": 4, "group_size": 16}}]
    )
    planned = compress.plan(Recipe.from_dict(values)).weights_bytes
    run(values)
    assert sum(f.stat().st_size for f in (tmp_path / "out" / "model").glob("*.safetensors")) == planned


def test_more_blocks_than_there_are_is_refused():
    with pytest.raises(StartError, match="layers: 4 shall remain, and the model has 3"):
        compress.Depth(layers=4)(tiny_model(), calibration=tiny_tokens())
    with pytest.raises(StartError, match="drop names block 7; there are blocks 0 to 2"):
        compress.Depth(drop=[7])(tiny_model())


@pytest.mark.parametrize("options", [{"bridge": True}, {"importance": "loss", "contiguous": True}])
def test_blocks_on_disk_leave_the_same_model_with_one_or_two_of_them_in_memory(folder, tmp_path, options, unverified):
    passes = [{"depth": {"layers": 2, **options}}]
    for residency in ("memory", "disk"):
        run(_values(folder, tmp_path / residency, passes=passes, residency=residency))
    files = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("memory", "disk")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.allclose(files[0][name], files[1][name], atol=1e-5) for name in files[0])
