"""Models that are no language models with one stack: a whole run over each, and plain transformers loads the result."""

import json
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

import compress
from compress.errors import CompressError, StartError
from compress.images import image_windows, patches_of
from compress.measure.measurements import BenchmarkJob, SpeedSettings
from compress.measure.running import prompt_tokens
from compress.measure.verification import plain_output
from compress.measure.worker import KINDS
from compress.pipeline import run
from compress.recipe import DataEntry
from compress.reports.report import Verified
from compress.reshaping import parameters_of
from compress.testing import outputs, save_tiny, tiny_inputs, tiny_model, tiny_tokens

NEW = ["roberta", "distilbert", "modernbert", "t5", "vit"]
BLOCKS = {"modernbert": 4}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of random pictures by class."""
    from PIL import Image

    folder, draw = tmp_path_factory.mktemp("pictures"), torch.Generator().manual_seed(0)
    for index in range(8):
        pixels = torch.randint(0, 256, (20 + index, 24, 3), generator=draw, dtype=torch.uint8).numpy()
        (folder / f"class{index % 2}").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"class{index % 2}" / f"{index}.png")
    return folder


@pytest.fixture(scope="module", params=NEW)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp(family) / "model", family)


def _recipe(folder, family, pictures, tmp_path, **changes):
    source = pictures if family == "vit" else folder.parent / "text.txt"
    if family != "vit":
        source.write_text("The cat sat on the mat and saw the rat. " * 20)
    return {
        "model": str(folder), "output": str(tmp_path / "out"), "benchmark": False,
        "passes": [{"depth": {"layers": BLOCKS.get(family, 2)}}, {"wanda": {"sparsity": 0.5}}],
        "data": {"calibration": {"source": str(source), "samples": 4, "length": 16}}, **changes,
    }  # fmt: skip


@pytest.mark.parametrize("residency", ["memory", "disk"])
def test_a_run_leaves_a_smaller_folder_that_plain_transformers_loads(
    folder, family, pictures, tmp_path, residency, monkeypatch
):
    expected = []
    monkeypatch.setattr("compress.pipeline.verify", partial(_loaded, expected, family))
    if (family, residency) == ("vit", "disk"):  # its files have older names than its modules
        with pytest.raises(StartError, match="Use residency: memory"):
            run(_recipe(folder, family, pictures, tmp_path, residency=residency))
        return
    report = run(_recipe(folder, family, pictures, tmp_path, residency=residency))
    assert expected == [report.stages[0].measurements["parameters"]]
    assert expected[0] < parameters_of(tiny_model(family))
    assert (tmp_path / "out" / "model" / "preprocessor_config.json").exists() == (family == "vit")


def _loaded(sizes, family, folder, ids, output, **_):
    """What `verify` does, in this process: the class that config.json names, what it gives, and how large it is."""
    config = json.loads((folder / "config.json").read_text())
    model = getattr(transformers, config["architectures"][0]).from_pretrained(folder).eval()
    sizes.append(parameters_of(model))
    assert torch.allclose(torch.cat([outputs(model, row) for row in ids.split(1)]), output, atol=1e-6)
    return Verified(reloaded=True, max_logit_difference=0.0)


@pytest.mark.parametrize("family", ["t5", "vit"])
def test_plain_transformers_in_a_process_of_its_own_gives_the_same(family, tmp_path):
    folder, inputs = save_tiny(tmp_path / family, family), tiny_inputs(family, samples=2, length=8)
    expected = torch.cat([outputs(tiny_model(family), row) for row in inputs.split(1)])
    assert torch.equal(plain_output(folder, inputs, tmp_path / "work"), expected)


@pytest.mark.parametrize("family", ["t5", "vit"])
def test_speed_memory_and_size_of_such_a_model_are_measured(family, tmp_path):
    folder = save_tiny(tmp_path / family, family)
    engine = {"runtime": "transformers", "folder": str(folder), "dtype": "auto"}
    speed = {"prompt": 8, "decode_prompt": 4, "new_tokens": 3, "rounds": 1, "warmup": 0}
    job = {
        "model": str(folder), "engine": engine, "engines": [engine], "device": "cpu", "dtype": "auto", "threads": 1,
        "seed": 0, "speed": speed, "prompt_length": 8, "new_tokens": 3, "cache_length": 8,
        "inputs": str(tmp_path / "in"),
    }  # fmt: skip
    save_file({"prompt": prompt_tokens(folder, BenchmarkJob(speed=SpeedSettings(**speed)))}, tmp_path / "in")
    values, records = KINDS["speed"](job)
    assert records["0/prefill_tokens_per_second"] > 0
    assert ("0/decode_tokens_per_second" in records) == values["engines"][0]["generates"] == (family == "t5")
    assert KINDS["memory"](job)[0]["peak_memory_bytes"] > 0
    quality, _ = KINDS["quality"]({**job, "inputs": None, "items": {}, "prompts": []})
    assert quality["parameters"] == parameters_of(tiny_model(family))


def test_the_decoder_is_given_the_text_one_place_later_behind_its_start():
    from compress.inputs import with_decoder

    config = tiny_model("t5", decoder_start_token_id=7).config
    batch = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    found = with_decoder(batch, config)
    assert found["decoder_input_ids"].tolist() == [[7, 3, 4]]
    assert found["decoder_attention_mask"].tolist() == [[1, 1, 0]]
    assert with_decoder(batch, tiny_model("llama").config) is batch


def test_the_second_path_of_a_decoder_follows_the_encoder_as_it_was():
    """GPTAQ-like passes: after the encoder is changed, the original path still gives the original model's outputs."""
    from compress.images import windows_given
    from compress.model import ModelHandle
    from compress.stream import CalibrationStream

    model, tokens = tiny_model("t5"), tiny_tokens(samples=3, length=12)
    expected = outputs(model, tokens)
    handle = ModelHandle.wrap(model)
    stream = CalibrationStream(handle, windows_given(tokens, model.config), original=True)
    for block in handle.blocks():
        stream.advance_original(block)
        for layer in block.layers().values() if block.stack.name.startswith("encoder") else ():
            layer.set_weight(layer.weight * 0.5)
        stream.advance(block)
    assert torch.equal(torch.cat(list(stream.outputs(stream.hidden))), outputs(model, tokens))
    norm, scale = model.decoder.final_layer_norm, model.model_dim**-0.5
    assert torch.allclose(model.lm_head(norm(torch.cat(stream.original)) * scale), expected, atol=1e-5)


def test_pictures_are_drawn_by_seed_and_made_by_the_models_own_processor(pictures, tmp_path):
    from PIL import Image

    folder = save_tiny(tmp_path / "vit", "vit")
    config = tiny_model("vit").config
    entry = DataEntry(source=str(pictures), samples=3, sampling="sequential")
    windows = image_windows(entry, "calibration", folder, config, seed=0)
    first = torch.from_numpy(np.array(Image.open(pictures / "class0" / "0.png").resize((16, 16), 2)))
    assert torch.allclose(windows.tokens[0], (first.permute(2, 0, 1) / 255 - 0.5) / 0.5, atol=1e-6)
    assert windows.length == patches_of(config) == 17
    drawn = [
        image_windows(DataEntry(source=str(pictures), samples=3), "calibration", folder, config, s) for s in (1, 1, 2)
    ]
    assert drawn[0].fingerprint == drawn[1].fingerprint != drawn[2].fingerprint


def test_what_pictures_cannot_do_is_refused(pictures, tmp_path):
    folder = save_tiny(tmp_path / "vit", "vit")
    config, entry = tiny_model("vit").config, DataEntry(source=str(pictures), samples=3)
    with pytest.raises(CompressError, match=r"holds 8 images .* 9 are asked for"):
        image_windows(entry.model_copy(update={"samples": 9}), "calibration", folder, config, 0)
    with pytest.raises(StartError, match="images are read for calibration only"):
        image_windows(entry, "evaluation", folder, config, 0)
    with pytest.raises(StartError, match="this model reads text"):
        image_windows(entry, "calibration", folder, tiny_model("llama").config, 0)
    with pytest.raises(StartError, match="pixel_values"):
        compress.Wanda()(tiny_model("vit"), calibration=tiny_tokens())
    with pytest.raises(StartError, match="pixel_values"):
        compress.Wanda()(tiny_model("vit"), calibration=["a text"])
    (pictures / "broken.png").write_text("no image")
    try:
        with pytest.raises(CompressError, match=r"broken\.png: this image cannot be read"):
            image_windows(entry.model_copy(update={"samples": 9}), "calibration", folder, config, 0)
    finally:
        (pictures / "broken.png").unlink()
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(StartError, match=r"holds no preprocessor_config\.json"):
        image_windows(entry, "calibration", folder, config, 0)


def test_what_trains_refuses_models_that_read_no_single_text():
    from compress.registry import PASSES

    for family in ("t5", "vit"):
        with pytest.raises(StartError, match="is not trained here"):
            PASSES.get("llm_qat")()(tiny_model(family), training=tiny_inputs(family), original=tiny_model(family))


def test_zeros_are_shared_out_by_measurement_where_there_is_one_stack():
    pass_ = compress.Wanda(sparsity=0.5, allocation="measured")
    assert pass_(tiny_model("vit"), calibration=tiny_inputs("vit")).coverage == 1.0
    with pytest.raises(StartError, match="takes one stack of blocks; not T5"):
        pass_(tiny_model("t5"), calibration=tiny_inputs("t5"))
    assert (
        compress.Wanda(sparsity=0.5, allocation="owl")(tiny_model("t5"), calibration=tiny_inputs("t5")).coverage > 0.9
    )
