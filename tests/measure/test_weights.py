"""What weights take in memory is counted by storages: shared once, packed as packed, mapped as far as they span."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import compress
from compress.formats.folder import write_model_folder
from compress.measure.transformers_engine import TransformersEngine
from compress.measure.weights import resident_weights
from compress.model import ModelHandle
from compress.passes.rtn import RTN
from compress.testing import save_tiny, tiny_model, tiny_tokenizer


def held(model):
    """Bytes of parameters and buffers, each object once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize("tied", [True, False])
def test_a_plain_model_takes_its_parameters_and_buffers_and_a_tied_head_nothing(tied):
    model = tiny_model("llama", tie_word_embeddings=tied)
    table = model.get_input_embeddings().weight
    assert resident_weights(model) == held(model)
    other = resident_weights(tiny_model("llama", tie_word_embeddings=not tied))
    assert abs(other - resident_weights(model)) == table.numel() * 4


def test_bfloat16_takes_half_of_float32():
    model = tiny_model("llama")
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    whole = resident_weights(model) - buffers
    assert resident_weights(model.to(torch.bfloat16)) < whole // 2 + buffers + 1


def test_a_view_takes_all_that_it_is_a_view_of_and_two_views_of_one_take_it_once():
    whole, layer = torch.zeros(100, 10), nn.Module()
    layer.register_buffer("a", whole[:3])
    layer.register_buffer("b", whole[2:7])
    assert resident_weights(layer) == 4000


def test_of_a_mapped_file_it_is_what_is_spanned(tmp_path):
    (tmp_path / "file").write_bytes(b"\0" * 8000)
    pages, layer = np.memmap(tmp_path / "file", np.float32, "c"), nn.Module()
    layer.register_buffer("a", torch.from_numpy(pages[0:100]))
    layer.register_buffer("b", torch.from_numpy(pages[50:150]))  # overlaps
    layer.register_buffer("c", torch.from_numpy(pages[1000:1200]))
    assert resident_weights(layer) == 4 * (150 + 200)


def test_what_layers_keep_beside_their_parameters_counts_and_other_modules_are_not_counted_twice():
    layer = nn.Linear(8, 4, bias=False)
    layer.weight.quant_state = SimpleNamespace(absmax=torch.zeros(6), nested=SimpleNamespace(code=torch.zeros(16)))
    layer.kept = {"rows": [torch.zeros(5)]}
    outer = nn.Sequential(layer)
    outer.__dict__["table"] = layer
    assert resident_weights(outer) == 4 * (32 + 6 + 16 + 5)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")
def test_a_layout_without_a_storage_counts_by_its_elements():
    layer = nn.Module()
    layer.packed = torch.zeros(16, 16).to_mkldnn()
    assert resident_weights(layer) == 1024


def test_packed_weights_count_as_they_are_packed_and_what_the_kernel_unpacks_beside_them(tmp_path):
    folder = save_tiny(tmp_path / "plain")
    model = tiny_model("llama")
    RTN(bits=4, group_size=32, symmetric=False)(model)
    write_model_folder(tmp_path / "packed", ModelHandle.wrap(model).contents(tiny_tokenizer()))
    loaded = compress.load(tmp_path / "packed")
    assert resident_weights(loaded) == held(loaded)
    assert resident_weights(loaded) < resident_weights(compress.load(folder))
    engine = TransformersEngine(loaded)
    engine.prefill([[3, 4, 5]])
    engine.step(), engine.step()
    zeros = sum(layer.prepared.zero.numel() for layer in loaded.modules() if getattr(layer, "prepared", None))
    assert engine.resident_bytes() == held(loaded) + zeros


def test_the_memory_job_states_it(pair, measured):
    from transformers import AutoModelForCausalLM

    for folder, found in zip(pair, (measured.original, measured.compressed), strict=True):
        figure = found.figures["resident_weights_bytes"]
        assert figure.value == held(AutoModelForCausalLM.from_pretrained(folder))
        assert figure.unit == "B"
        assert figure.higher_is_better is False
    assert measured.comparison["resident_weights_bytes"].verdict == "no_difference"
