"""Exports run by llama.cpp itself, where it is installed: against the model in memory, and the check of every run."""

import json
import math

import pytest
import torch

import compress
from compress.errors import CompressError, StartError
from compress.formats import gguf as module
from compress.formats.base import Contents
from compress.formats.folder import write_model_folder
from compress.measure.export_check import likelihood_differences, unverified, verify_export
from compress.measure.llama_cpp import LlamaCpp
from compress.passes.rtn import RTN
from compress.recipe import Recipe
from compress.testing import BYTE_VOCABULARY, byte_tokenizer, save_tiny, tiny_model

needed = pytest.mark.skipif(LlamaCpp().missing() is not None, reason="llama-cpp-python is not installed")
TEXT = "the boys and the 12 girls were in there, on a hill. I'll say: 100%"


def tiny(family, **changes):
    window = {"sliding_window": 64} if family == "mistral" else {}
    return tiny_model(family, **{"vocab_size": BYTE_VOCABULARY, **window, **changes})


def ids_of(text=TEXT):
    return torch.tensor(byte_tokenizer()(text)["input_ids"][:60])[None]


def export(model, folder):
    contents = Contents.of_model(model, byte_tokenizer())
    folder = write_model_folder(folder / "exports" / "gguf", contents, "gguf")
    (entry,) = unverified("gguf", folder, contents)
    return folder, entry


@torch.no_grad()
def logits_of(model, ids):
    return model(ids).logits.float()


ROTARY = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {**ROTARY, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GEMMA = {
    "full_attention": {**ROTARY, "rope_type": "linear"},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
CASES = {
    "llama": ("llama", {}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, llama3 frequencies": ("llama", {"rope_parameters": LLAMA3}),
    "llama, linear": ("llama", {"rope_parameters": {**ROTARY, "rope_type": "linear"}}),
    "llama, yarn": ("llama", {"rope_parameters": {**ROTARY, "rope_type": "yarn"}}),
    "llama, wide heads": ("llama", {"head_dim": 16}),
    "mistral": ("mistral", {}),
    "qwen3": ("qwen3", {}),
    "gemma3": ("gemma3", {}),
    "gemma3, linear": ("gemma3", {"rope_parameters": GEMMA}),
    "gemma3, the usual windows": ("gemma3", {"num_hidden_layers": 6, "layer_types": None}),
    "gemma3, no windows": ("gemma3", {"layer_types": ["full_attention"] * 3}),
}


@needed
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_the_model_does(case, tmp_path):
    """A dense float32 file: what differs is the cache in float16."""
    family, changes = CASES[case]
    model, ids = tiny(family, **changes), ids_of()
    folder, _ = export(model, tmp_path)
    engine = LlamaCpp().open(folder, threads=1, device="cpu")
    found = torch.from_numpy(engine.logits(ids[0].tolist()))[None]
    engine.close()
    divergence, difference = likelihood_differences(logits_of(model, ids), found, ids)
    assert divergence < 1e-5
    assert difference < 2e-3


@needed
@pytest.mark.parametrize("grid", ["gguf-q4_0", "gguf-q4_1", "gguf-q8_0"])
def test_blocks_cost_no_more_than_inputs_in_8_bits(grid, tmp_path):
    model, ids = RTN(grid=grid, embeddings=8 if grid != "gguf-q4_1" else None)(tiny("llama")).model, ids_of()
    folder, _ = export(model, tmp_path)
    engine = LlamaCpp().open(folder, threads=1, device="cpu")
    found = torch.from_numpy(engine.logits(ids[0].tolist()))[None]
    engine.close()
    divergence, difference = likelihood_differences(logits_of(model, ids), found, ids)
    assert 1e-8 < divergence < 1e-3
    assert difference < 0.03


@needed
@pytest.mark.parametrize("grid", ["gguf-q2_k", "gguf-q3_k", "gguf-q4_k", "gguf-q5_k", "gguf-q6_k"])
def test_llama_cpp_computes_k_quants_as_we_round_them(grid, tmp_path):
    """Inputs are rounded to 8 bits, 256 with one scale. In this wide model that alone makes 0.003, whatever the grid,
    and 0.002 beside blocks of 32."""
    shape = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    model, ids = RTN(grid=grid, embeddings=8)(tiny("llama", **shape)).model, ids_of()
    folder, _ = export(model, tmp_path)
    engine = LlamaCpp().open(folder, threads=1, device="cpu")
    found = torch.from_numpy(engine.logits(ids[0].tolist()))[None]
    engine.close()
    divergence, difference = likelihood_differences(logits_of(model, ids), found, ids)
    assert 1e-8 < divergence < 0.01
    assert difference < 0.1


@needed
def test_the_engine_writes_the_likeliest_tokens_and_begins_anew(tmp_path):
    model, ids = tiny("qwen3"), ids_of()[:, :12]
    folder, _ = export(model, tmp_path)
    engine = LlamaCpp().open(folder, threads=1, device="cpu")
    wanted = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)[0, 12:].tolist()
    for _ in range(2):
        engine.prefill([ids[0].tolist()])
        assert [engine.step()[0] for _ in range(8)] == wanted
        first = engine.logits(ids[0].tolist())
    assert first[-1].argmax() == wanted[0]
    with pytest.raises(CompressError, match="step comes after prefill"):
        engine.step()
    with pytest.raises(CompressError, match="64 tokens"):
        engine.logits([3] * 65)
    engine.close()


@needed
def test_the_engine_cuts_text_as_the_tokenizer_does(tmp_path):
    folder, _ = export(tiny("llama"), tmp_path)
    engine, tokenizer = LlamaCpp().open(folder, threads=1, device="cpu"), byte_tokenizer()
    for text in (TEXT, "naïve 你好\n\n  <eos> 1212", ""):
        for special in (False, True):
            assert engine.tokens(text, special) == tokenizer(text, add_special_tokens=special)["input_ids"]
    engine.close()


@needed
def test_an_export_is_verified_in_a_fresh_process(tmp_path):
    model, ids = RTN(grid="gguf-q8_0")(tiny("llama")).model, ids_of()
    _, entry = export(model, tmp_path)
    assert not entry.reloaded
    found = verify_export(tmp_path, entry, ids, logits_of(model, ids), byte_tokenizer(), workdir=tmp_path / "work")
    assert (found.reloaded, found.by, found.same_tokens) == (True, "llama.cpp", True)
    assert found.mean_logprob_difference < found.allowed
    assert not list((tmp_path / "work").glob("export-*"))


@needed
def test_a_file_that_is_another_model_is_found_out(tmp_path, monkeypatch):
    model, ids = tiny("llama", initializer_range=1.0), ids_of()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    monkeypatch.setattr(module, "rows_of", lambda contents, name: None)  # as if nobody had thought of q's and k's rows
    _, entry = export(model, tmp_path)
    with pytest.raises(CompressError, match=r"differs from the model in memory.*not verified"):
        verify_export(tmp_path, entry, ids, logits_of(model, ids), byte_tokenizer(), workdir=tmp_path / "work")


@needed
def test_a_tokenizer_that_cuts_otherwise_is_found_out(tmp_path, monkeypatch):
    model, ids = tiny("llama"), ids_of()
    monkeypatch.setattr("compress.formats.gguf_tokenizer._pre_tokenizer", lambda tokenizer: "smollm")
    _, entry = export(model, tmp_path)
    with pytest.raises(CompressError, match=r"other tokens than the model's tokenizer.*not verified"):
        verify_export(tmp_path, entry, ids, logits_of(model, ids), byte_tokenizer(), workdir=tmp_path / "work")


@needed
def test_a_tokenizer_that_llama_cpp_cuts_otherwise_is_refused_at_the_start(monkeypatch):
    form, config = module.GGUF(), tiny("llama").config
    assert form.refuses_tokenizer(byte_tokenizer(), config) is None
    monkeypatch.setattr("compress.formats.gguf_tokenizer._pre_tokenizer", lambda tokenizer: "smollm")
    assert "llama.cpp cuts a text into other tokens" in form.refuses_tokenizer(byte_tokenizer(), config)


@needed
def test_a_file_cut_off_is_refused_in_one_sentence(tmp_path):
    folder, entry = export(tiny("llama"), tmp_path)
    data = (folder / "model.gguf").read_bytes()
    (folder / "model.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(CompressError, match=r"cannot be run by llama.cpp: .*model.gguf cannot be loaded: .+"):
        verify_export(tmp_path, entry, ids_of(), torch.zeros(1, 1, 1), None, workdir=tmp_path / "work")


@needed
def test_a_run_exports_verifies_and_reports(tmp_path):
    model = save_tiny(tmp_path / "tiny", vocab_size=BYTE_VOCABULARY)
    byte_tokenizer().save_pretrained(model)
    recipe = {
        "model": str(model), "passes": [{"rtn": {"grid": "gguf-q4_0", "embeddings": 8}}], "export": ["gguf"],
        "benchmark": False, "output": str(tmp_path / "run"),
    }  # fmt: skip
    report = compress.run(recipe)
    (entry,) = report.exports
    assert (entry.format, entry.path, entry.reloaded, entry.same_tokens) == ("gguf", "exports/gguf", True, True)
    assert entry.bytes == (tmp_path / "run/exports/gguf/model.gguf").stat().st_size
    said = json.loads((tmp_path / "run/report.json").read_text())["exports"]
    assert said[0]["by"] == "llama.cpp"
    assert "exports/gguf" in (tmp_path / "run/report.md").read_text()


@pytest.mark.parametrize(
    ("module", "extra"), [("compress.measure.llama_cpp", "llama-cpp"), ("compress.formats.gguf", "gguf")]
)
def test_without_the_engine_or_the_writer_an_export_is_refused_at_the_start(tmp_path, monkeypatch, module, extra):
    model = save_tiny(tmp_path / "tiny")
    monkeypatch.setattr(f"{module}.find_spec", lambda name: None)
    recipe = {"model": str(model), "passes": [{"rtn": {"grid": "gguf-q4_0"}}], "export": ["gguf"], "benchmark": False}
    with pytest.raises(StartError, match=rf"export: .*pip install 'compress\[{extra}\]'"):
        compress.plan(Recipe.from_dict(recipe))


def test_a_tokenizer_that_cannot_be_held_is_refused_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(LlamaCpp, "missing", lambda self: None)
    model = save_tiny(tmp_path / "tiny")
    recipe = {
        "model": str(model), "passes": [{"rtn": {"grid": "gguf-q4_0"}}], "export": ["gguf"], "benchmark": False,
        "output": str(tmp_path / "run"),
    }  # fmt: skip
    with pytest.raises(StartError, match=r"export: .*WordLevel"):
        compress.run(recipe)
    assert not (tmp_path / "run").exists()


def test_likelihood_differences_by_hand():
    """Two tokens; before, both as likely; after, 3/4 and 1/4."""
    before, after = torch.zeros(1, 2, 2), torch.tensor([[[3.0, 1.0], [3.0, 1.0]]]).log()
    divergence, difference = likelihood_differences(before, after, torch.tensor([[0, 1]]))
    assert divergence == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    assert difference == pytest.approx(math.log(1 / 2) - math.log(1 / 4))
