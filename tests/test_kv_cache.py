"""A recipe with `kv_cache`: what it leaves, how the folder is read, what the benchmark measures, and refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_pipeline import content
from transformers import AutoModelForCausalLM

import compress
from compress.errors import RecipeError, StartError
from compress.measure.likelihood import window_scores
from compress.nn.quant_cache import CacheSpec, QuantCacheLayer, cache_spec, packed_cache, use_packed_cache
from compress.passes.kv_cache import KVCache
from compress.pipeline import run
from compress.planning import plan
from compress.recipe import Recipe
from compress.testing import save_tiny, tiny_model, tiny_tokens

RTN = {"rtn": {"bits": 4, "group_size": 16}}
CACHE = {"kv_cache": {"bits": 4, "group_size": 8, "residual_length": 4}}


def recipe(model, output, *passes, **changes):
    values = {"model": str(model), "passes": list(passes), "benchmark": False, "output": str(output)}
    return {**values, **changes}


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory):
    """Runs of rtn alone, and of kv_cache after it and before it."""
    base = tmp_path_factory.mktemp("cache")
    run(recipe(tiny_folder, base / "rtn", RTN))
    report = run(recipe(tiny_folder, base / "after", RTN, CACHE))
    run(recipe(tiny_folder, base / "before", CACHE, RTN, residency="disk"))
    return base, report


def test_the_weights_are_those_without_it(folders):
    base, _ = folders
    expected = (base / "rtn" / "model" / "model.safetensors").read_bytes()
    for name in ("after", "before"):
        assert (base / name / "model" / "model.safetensors").read_bytes() == expected
        assert (base / name / "model" / "config.json").read_bytes() == (base / "rtn/model/config.json").read_bytes()


@pytest.mark.slow
def test_a_run_of_kv_cache_alone_leaves_the_original_weights(tiny_folder, tmp_path):
    for residency in ("memory", "disk"):
        run(recipe(tiny_folder, tmp_path / residency, CACHE, residency=residency))
        found = load_file(tmp_path / residency / "model" / "model.safetensors")
        for name, tensor in load_file(tiny_folder / "model.safetensors").items():
            assert torch.equal(found[name], tensor)


def test_the_stage_says_what_a_token_takes(folders):
    stage = folders[1].stages[1]
    assert stage.coverage == 0
    # Three layers, two heads of 8 channels: 4 codes a head for keys and values each, and 16-bit scale and least.
    assert stage.measurements == {
        "packed_layers": 3, "layers": 3, "cache_bytes_per_token": 3 * 2 * (8 + 4 + 4), "cache_bytes_per_token_before":
        3 * 2 * 2 * 8 * 4,
    }  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_stated_bytes_of_a_token_are_those_that_a_cache_grows_by(family, bits):
    model = tiny_model(family)
    pass_ = KVCache(bits=bits, group_size=8, residual_length=0)
    sizes = []
    for length in (16, 32):
        cache = packed_cache(model.config, pass_.spec)
        with torch.no_grad():
            model(input_ids=tiny_tokens(1, length), past_key_values=cache, use_cache=True)
        sizes.append(sum(layer.nbytes() for layer in cache.layers))
    stated = pass_.measurements(model.config, 4)
    assert (sizes[1] - sizes[0]) / 16 == stated["cache_bytes_per_token"]
    assert sum(layer.keys.numel() for layer in cache.layers) == 0


@pytest.mark.parametrize("name", ["after", "before"])
def test_compress_load_packs_the_cache_by_default_and_not_if_told(folders, name):
    model = compress.load(folders[0] / name)
    assert cache_spec(model) == CacheSpec(4, 8, 4)
    tokens = tiny_tokens(2, 40)
    with torch.no_grad():
        found = model(input_ids=tokens).past_key_values
        plain = compress.load(folders[0] / name, packed_cache=False)(input_ids=tokens).past_key_values
    assert all(isinstance(layer, QuantCacheLayer) for layer in found.layers)
    assert not any(isinstance(layer, QuantCacheLayer) for layer in plain.layers)


def test_plain_transformers_reads_the_folder_as_ever(folders):
    model = AutoModelForCausalLM.from_pretrained(folders[0] / "after" / "model")
    out = model.generate(tiny_tokens(1, 8), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape[1] > 8


def test_a_continued_run_gives_the_same_folder(folders, tiny_folder, tmp_path, monkeypatch, unverified):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    for residency in ("memory", "disk"):
        asked = recipe(tiny_folder, tmp_path / residency, RTN, CACHE, residency=residency)
        with monkeypatch.context() as patch:
            patch.setattr("compress.pipeline._export", fail)
            with pytest.raises(KeyboardInterrupt):
                run(asked)
        run(asked)
        assert content(tmp_path / residency / "model") == content(folders[0] / "after" / "model")


def test_the_plan_counts_nothing_for_it(tiny_folder, tmp_path):
    without = plan(Recipe.from_dict(recipe(tiny_folder, tmp_path / "a", RTN)))
    found = plan(Recipe.from_dict(recipe(tiny_folder, tmp_path / "b", RTN, CACHE)))
    assert found.weights_bytes == without.weights_bytes
    step = next(step for step in found.steps if step.name == "kv_cache")
    assert step.note == "changes no weight"
    assert step.weights_bytes == found.weights_bytes


@pytest.mark.parametrize(("family", "reason"), [("bert", "does not write text"), ("mistral", "window of tokens")])
def test_models_without_such_a_cache_are_refused_by_the_plan(family, reason, tmp_path):
    folder = save_tiny(tmp_path / "model", family)
    with pytest.raises(StartError, match=reason):
        plan(Recipe.from_dict(recipe(folder, tmp_path / "out", CACHE)))


def test_other_bits_are_refused_as_the_recipe_is_read(tiny_folder, tmp_path):
    with pytest.raises(RecipeError, match="allowed: 4, 8"):
        Recipe.from_dict(recipe(tiny_folder, tmp_path / "out", {"kv_cache": {"bits": 2}}))


# ------------------------------------------------------------------------------------------------ the benchmark


def test_scores_are_those_of_reading_a_group_at_a_time_from_the_cache():
    model, tokens = tiny_model("llama"), tiny_tokens(3, 30)
    exact = window_scores(model, tokens)
    use_packed_cache(model, CacheSpec(8, 8, 64))
    assert torch.allclose(window_scores(model, tokens).nll, exact.nll, atol=1e-3)
    spec = CacheSpec(4, 8, 4)
    use_packed_cache(model, spec)
    found = window_scores(model, tokens)
    cache, expected = packed_cache(model.config, spec), torch.zeros(3)
    with torch.no_grad():
        for start in range(0, 30, 8):
            part = tokens[:, start : start + 8]
            logits = model(input_ids=part, past_key_values=cache, use_cache=True).logits.log_softmax(-1)
            following = tokens[:, start + 1 : start + 9]
            expected -= logits[:, : following.shape[1]].gather(-1, following[..., None]).sum((1, 2))
    assert torch.allclose(found.nll.float(), expected, rtol=1e-5)
    assert not torch.allclose(found.nll, exact.nll, atol=1e-3)


def test_padded_windows_score_as_those_that_are_not():
    model, tokens = tiny_model("llama"), tiny_tokens(2, 30)
    use_packed_cache(model, CacheSpec(4, 8, 4))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, 19:] = False
    padded = window_scores(model, tokens, mask=mask).nll
    assert padded[0] == pytest.approx(float(window_scores(model, tokens[:1, :19]).nll), rel=1e-4)


@pytest.mark.slow
def test_the_benchmark_measures_quality_through_the_cache(folders, tiny_folder, text_file, tmp_path):
    data = {"evaluation": {"source": str(text_file), "samples": 4, "length": 48}}
    changes = {"data": data, "benchmark": {"metrics": ["perplexity", "kl_divergence"]}}
    coarse = {"kv_cache": {"bits": 4, "group_size": 8, "residual_length": 0}}
    report = run(recipe(tiny_folder, tmp_path / "out", coarse, **changes))
    assert report.compressed["kl_divergence"].value > 1e-4
    assert any("a cache of 4 bits" in note for note in report.notes)
    assert report.verified.max_logit_difference <= 1e-3
    assert json.loads((tmp_path / "out" / "report.json").read_text())["stages"][0]["coverage"] == 0
