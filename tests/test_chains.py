"""One pass after another: parts go, zeros come, adapters are trained, weights are rounded; each on what the one before
left, and the folder is what the last one left."""

import json

import pytest
import torch

import compress
from compress.errors import RecipeError
from compress.nn.quant_linear import QuantLinear
from compress.pipeline import run
from compress.recipe import Recipe
from compress.registry import PASSES
from compress.testing import small_options, tiny_model
from tests.test_vocabulary import DOMAIN, byte_level

ROWS = 384
LORA = {"lora": {"r": 4, "tokens": 512, "learn_from": "text", "batch_size": 4, "merge": True}}
GPTQ = {"gptq": {"bits": 4, "group_size": 8}}
WIDTH = {"width": {"intermediate_size": 40, "heads": 2}}
DEPTH = {"depth": {"layers": 2}}
MENDED = {"block_distill": {"iterations": 4}}
ALPS = {"alps": {"pattern": "2:4"}}

#: Name -> the passes.
CHAINS = {
    "all that removes, an adapter, bits": [WIDTH, DEPTH, {"vocab": {}}, LORA, GPTQ],
    "tokens, parts, zeros, mended": [{"vocab": {}}, WIDTH, {"wanda": {"sparsity": 0.5}}, MENDED],
    "zeros, mended, bits": [ALPS, MENDED, GPTQ],
    "zeros, an adapter, bits": [ALPS, LORA, GPTQ],
    "zeros, trained whole, bits": [ALPS, {"distill": {"losses": ["labels"], "steps": 2, "batch_size": 4}}, GPTQ],
    "parts, zeros, trained whole": [DEPTH, WIDTH, ALPS, {"distill": {"losses": ["kl"], "steps": 2, "batch_size": 4}}],
    "zeros, then a block less": [ALPS, DEPTH, {"rtn": {"bits": 4, "group_size": 8}}],
}  # fmt: skip
#: Those that take a while more; what they pair is paired by others as well.
LONG = ("zeros, trained whole, bits", "zeros, then a block less")
REMOVING = [n for n in PASSES.names() if PASSES.get(n).structural and "quantized" not in PASSES.get(n).accepts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chains")
    tiny_model(vocab_size=ROWS, bos_token_id=0, eos_token_id=0, pad_token_id=0).save_pretrained(folder / "model")
    byte_level().save_pretrained(folder / "model")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOMAIN * 8))
    return folder


def _values(folder, output, passes):
    text = {"source": str(folder / "text.jsonl"), "samples": 8, "length": 16}
    return {
        "model": str(folder / "model"), "output": str(output), "benchmark": False, "passes": passes,
        "data": {"calibration": text, "training": text},
    }  # fmt: skip


def _matrices(model):
    """The weights of the blocks' layers, float32, packed ones expanded."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            yield name, module.dequantize(torch.float32)
        elif isinstance(module, torch.nn.Linear) and "layers" in name:
            yield name, module.weight.detach().float()


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in CHAINS])
def test_a_chain_leaves_what_its_passes_say(name, folder, tmp_path, unverified):
    passes = CHAINS[name]
    asked = {key: options for one in passes for key, options in one.items()}
    values = _values(folder, tmp_path / "out", passes)
    planned = compress.plan(Recipe.from_dict(values))
    report = run(values)
    assert [stage.pass_ for stage in report.stages] == list(asked)
    files = (tmp_path / "out" / "model").glob("*.safetensors")
    assert sum(file.stat().st_size for file in files) <= 1.01 * planned.weights_bytes
    model = compress.load(tmp_path / "out")
    assert len(model.model.layers) == (2 if "depth" in asked else 3)
    if "width" in asked:
        assert (model.config.intermediate_size, model.config.num_attention_heads) == (40, 2)
    if "vocab" in asked:
        assert model.config.vocab_size < ROWS
    for layer, weight in _matrices(model):
        if "alps" in asked:  # of every four neighbours, two are zero, whatever came after
            assert int((weight.unflatten(1, (-1, 4)) == 0).sum(2).min()) >= 2, layer
        if "wanda" in asked:
            assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.02), layer
    rounded = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert bool(rounded) == ("gptq" in asked or "rtn" in asked)
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.arange(16)[None]).logits).all()


@pytest.mark.slow
def test_the_longest_chain_is_verified_in_plain_transformers(folder, tmp_path):
    report = run(_values(folder, tmp_path / "out", CHAINS["all that removes, an adapter, bits"]))
    assert report.verified.reloaded


@pytest.mark.parametrize("name", REMOVING)
def test_parts_are_not_removed_from_what_is_rounded(name, folder, tmp_path):
    cls = PASSES.get(name)
    passes = [{"rtn": {"bits": 4, "group_size": 8}}, {name: small_options(cls)}]
    with pytest.raises(RecipeError, match="takes dense or sparse weights, and rtn leaves quantized ones"):
        Recipe.from_dict(_values(folder, tmp_path, passes))
