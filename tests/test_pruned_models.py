"""Pruned models on their way: what may follow, that zeros stay, and what the report says of them."""

import pytest
import torch

import compress
from compress.data import windows_from
from compress.errors import RecipeError, StartError
from compress.nn.quant_linear import QuantLinear
from compress.opening import open_model
from compress.passes.base import Context
from compress.pipeline import ZEROS_NOTE
from compress.recipe import Recipe
from compress.testing import save_tiny, tiny_model, tiny_tokens
from compress.workspace import Stage

TOKENS = tiny_tokens()
PRUNING = [compress.Magnitude, compress.Wanda, compress.SparseGPT, compress.ALPS]
pruning = pytest.mark.parametrize("method", PRUNING, ids=lambda method: method.__name__)


def matrices(model):
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            yield name, module.dequantize(torch.float32)
        elif isinstance(module, torch.nn.Linear) and "layers" in name:
            yield name, module.weight.detach()


@pruning
@pytest.mark.parametrize("rounding", [{}, {"symmetric": False}, {"act_order": False}])
def test_gptq_after_2_of_4_keeps_the_zeros_zero(method, rounding):
    model = tiny_model("llama")
    method(pattern="2:4")(model, calibration=TOKENS)
    before = {name: weight == 0 for name, weight in matrices(model)}
    assert all((zeros.unflatten(1, (-1, 4)).sum(2) >= 2).all() for zeros in before.values())
    compress.GPTQ(bits=4, group_size=16, **rounding)(model, calibration=TOKENS)
    for name, weight in matrices(model):
        assert not weight[before[name]].any(), name
        assert weight.any()


@pruning
def test_a_pruned_model_can_be_pruned_further_and_no_zero_comes_back(method):
    model = tiny_model("llama")
    compress.Wanda(pattern="2:4")(model, calibration=TOKENS)
    before = {name: weight == 0 for name, weight in matrices(model)}
    method(sparsity=0.75)(model, calibration=TOKENS)
    for name, weight in matrices(model):
        assert not weight[before[name]].any(), name
        assert float((weight == 0).float().mean()) == pytest.approx(0.75)


@pruning
def test_pruning_what_is_quantized_is_refused(method):
    with pytest.raises(RecipeError, match="it takes dense or sparse weights, and rtn leaves quantized ones"):
        Recipe.from_dict(
            {"model": "builtin:tiny", "data": {"calibration": {"source": "builtin:tiny"}},
             "passes": [{"rtn": {}}, {method.name: {}}]}
        )  # fmt: skip
    model = tiny_model("llama")
    compress.RTN(group_size=16)(model)
    with pytest.raises(StartError, match="takes dense or sparse weights, and this model's are quantized"):
        method()(model, calibration=TOKENS)


@pytest.mark.parametrize("passes", [[{"magnitude": {}}], [{"magnitude": {}}, {"rtn": {"group_size": 16}}]])
def test_the_report_says_that_zeros_bring_no_speed_and_no_space(passes, tmp_path, unverified):
    folder = save_tiny(tmp_path / "model")
    recipe = {"model": str(folder), "passes": passes, "benchmark": False}
    report = compress.run({**recipe, "output": str(tmp_path / "run")})
    assert ZEROS_NOTE in report.notes
    assert "no speed and save no space" in (tmp_path / "run" / "report.md").read_text()
    rounded = compress.run({**recipe, "passes": [{"rtn": {"group_size": 16}}], "output": str(tmp_path / "other")})
    assert ZEROS_NOTE not in rounded.notes


@pytest.mark.parametrize("residency", ["memory", "disk"])
def test_alps_continues_where_it_was_to_the_same_bytes(residency, tmp_path):
    folder = save_tiny(tmp_path / "model")
    pass_ = compress.ALPS(sparsity=0.6, allocation="owl")
    context = Context(calibration=windows_from(TOKENS, None), stage=Stage(tmp_path / "stage"), tokens_per_batch=64)
    pass_.run(open_model(folder, residency=residency), context)
    files = {file.name: file.read_bytes() for file in (tmp_path / "stage").glob("*.safetensors")}
    assert len(files) == 3
    for name in ("model.layers.1", "model.layers.2"):
        (tmp_path / "stage" / f"{name}.json").unlink()
    pass_.run(open_model(folder, residency=residency), context)
    for name, content in files.items():
        assert (tmp_path / "stage" / name).read_bytes() == content, name
