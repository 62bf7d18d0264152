"""ONNX Runtime GenAI writes what the model writes, and a run that exports for it ends only if it does."""

import json

import numpy as np
import pytest
import torch

import compress
from compress.errors import CompressError
from compress.formats.base import Contents
from compress.formats.folder import write_model_folder
from compress.measure import onnxruntime_engine
from compress.measure.export_check import Export, verify_export
from compress.measure.onnxruntime_engine import ROOM, OnnxRuntime
from compress.measure.transformers_engine import TransformersEngine
from compress.passes.rtn import RTN
from compress.planning import plan
from compress.recipe import Recipe
from compress.registry import RUNTIMES
from compress.testing import BYTE_VOCABULARY, byte_tokenizer, tiny_model, tiny_tokens

pytest.importorskip("onnxruntime_genai")


def exported(folder, model, tokenizer=None):
    return write_model_folder(folder, Contents.of_model(model, tokenizer), "onnx")


def opened(folder):
    return OnnxRuntime().open(folder, threads=1, device="cpu")


def written(engine, prompts, tokens):
    engine.prefill(prompts)
    return [engine.step() for _ in range(tokens)]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_it_writes_what_transformers_writes_beyond_the_room_it_made(family, tmp_path):
    model = tiny_model(family, max_position_embeddings=2 * ROOM)
    engine, wanted = opened(exported(tmp_path / "export", model)), TransformersEngine(model)
    prompts = [[5, 9, 30, 7, 12]]
    assert written(engine, prompts, ROOM + 20) == written(wanted, prompts, ROOM + 20)
    assert written(engine, prompts, 3) == written(wanted, prompts, 3)


def test_rows_of_a_batch_are_written_like_single_ones_without_the_tokens_that_end_a_text(tmp_path):
    model = tiny_model("qwen3")
    wanted = TransformersEngine(model)
    batches = [[[5, 9, 30], [40, 3, 8]], [[3, 4], [9, 8]], [[7, 7, 7]]]
    texts = [written(wanted, prompts, 12) for prompts in batches]
    for name, end in (("other", 0), ("own", texts[0][3][0])):
        model.config.eos_token_id = model.generation_config.eos_token_id = end
        engine = opened(exported(tmp_path / name, model))
        found = [written(engine, prompts, 12) for prompts in batches]
        if name == "other":
            assert found == texts
        assert end not in [token for row in found[0] for token in row]
        assert found[2] == texts[2]


def test_its_logits_are_the_models_and_leave_the_cache_empty(tmp_path):
    model = RTN(bits=4, group_size=16)(tiny_model("llama")).model
    folder = exported(tmp_path / "export", model)
    engine, wanted = opened(folder), TransformersEngine(model)
    engine.prefill([[4, 5]])
    config = model.config
    width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    assert engine.cache_bytes() == config.num_hidden_layers * 2 * width * 4 * 64
    ids = [4, 5, 6, 70]
    logits, exact = engine.logits(ids), OnnxRuntime().exact(folder, threads=1)(ids)
    assert logits.dtype == exact.dtype == np.float32
    assert np.abs(exact - wanted.logits(ids)).max() < 2e-5
    assert 1e-3 < np.abs(logits - wanted.logits(ids)).max() < 0.3  # its kernels round what enters a layer
    assert engine.cache_bytes() is None
    with pytest.raises(CompressError, match="read a prompt"):
        engine.step()


def test_the_context_is_the_end_of_a_text(tmp_path):
    engine = opened(exported(tmp_path / "export", tiny_model("llama")))
    assert engine.context == 64
    engine.prefill([[5] * 63])
    engine.step()
    with pytest.raises(CompressError, match="room for 64 tokens"):
        [engine.step() for _ in range(3)]


def test_it_cuts_text_into_the_models_tokens(tmp_path):
    tokenizer = byte_tokenizer()
    engine = opened(exported(tmp_path / "export", tiny_model("llama", vocab_size=BYTE_VOCABULARY), tokenizer))
    for special in (False, True):
        text = "The naïve café's  3 \n dogs"
        assert engine.tokens(text, special) == tokenizer(text, add_special_tokens=special)["input_ids"]


def test_a_folder_that_is_no_export_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "genai_config.json").write_text("{}")
    assert OnnxRuntime().can_load(tmp_path)
    with pytest.raises(CompressError, match="cannot load"):
        opened(tmp_path)
    with pytest.raises(CompressError, match="device: cpu"):
        OnnxRuntime().open(tmp_path, threads=1, device="cuda")


def test_where_it_is_not_installed_the_recipe_is_refused_with_the_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(onnxruntime_engine, "find_spec", lambda name: None)
    assert "onnxruntime" in RUNTIMES
    with pytest.raises(CompressError, match=r"compress\[onnx\]"):
        Recipe.from_dict({"model": "builtin:tiny", "benchmark": {"runtimes": ["onnxruntime"]}})
    with pytest.raises(CompressError, match=r"compress\[onnx\]"):
        plan(Recipe.from_dict({"model": "builtin:tiny", "export": ["onnx"], "output": str(tmp_path / "run")}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", vocab_size=BYTE_VOCABULARY).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_run_that_exports_reloads_the_export_by_genai(folder, text_file, tmp_path):
    report = compress.run(
        {
            "model": str(folder),
            "data": {"calibration": {"source": str(text_file), "samples": 8, "length": 32}},
            "passes": [{"gptq": {"bits": 4, "group_size": 16, "embeddings": 8}}],
            "benchmark": False,
            "export": ["onnx"],
            "output": str(tmp_path / "run"),
        }
    )
    (export,) = report.exports
    assert (export.by, export.reloaded, export.same_tokens) == ("onnxruntime", True, True)
    assert export.exact_difference < 1e-5 < export.kl_divergence < 0.01
    assert export.bytes == sum(file.stat().st_size for file in (tmp_path / "run/exports/onnx").iterdir())


def test_an_export_with_a_wrong_scale_is_not_verified(tmp_path):
    model = RTN(bits=8, group_size=32)(tiny_model("llama", vocab_size=BYTE_VOCABULARY)).model
    folder = exported(tmp_path / "exports" / "onnx", model)
    ids = tiny_tokens(1, 24)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    entry = Export(format="onnx", path="exports/onnx", bytes=0, by="onnxruntime", allowed=1.0, allowed_exactly=1e-3)
    graph = folder / "model.onnx"
    onnx = pytest.importorskip("onnx")
    scales = next(
        tensor for tensor in onnx.load(graph, load_external_data=False).graph.initializer
        if tensor.name.endswith("v_proj.weight_scale")
    )  # fmt: skip
    place = {entry.key: entry.value for entry in scales.external_data}
    with open(folder / place["location"], "r+b") as file:
        file.seek(int(place["offset"]))
        first = np.frombuffer(file.read(int(place["length"])), np.float32)
        file.seek(int(place["offset"]))
        (first * 1.1).astype(np.float32).tofile(file)
    with pytest.raises(CompressError, match="nothing but its weights is rounded"):
        verify_export(tmp_path, entry, ids, logits, None, workdir=tmp_path / "work")


@pytest.mark.slow
def test_an_export_that_does_not_open_is_not_verified(tmp_path):
    folder = exported(tmp_path / "exports" / "onnx", tiny_model("llama"))
    told = json.loads((folder / "genai_config.json").read_text())
    told["model"]["decoder"]["filename"] = "other.onnx"
    (folder / "genai_config.json").write_text(json.dumps(told))
    entry = Export(format="onnx", path="exports/onnx", bytes=0, by="onnxruntime", allowed=1.0)
    with pytest.raises(CompressError, match="cannot be run by onnxruntime"):
        verify_export(tmp_path, entry, tiny_tokens(1, 8), torch.zeros(1, 8, 96), None, workdir=tmp_path / "work")
