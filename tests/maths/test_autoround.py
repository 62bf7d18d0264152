"""What block-wise training does to a block: less error than its start, never more; the start's codes without it."""

import pytest
import torch

import compress
from compress.testing import tiny_model, tiny_tokens

GRID = {"bits": 3, "group_size": 16}


def _run(**options):
    model = tiny_model("llama")
    result = compress.AutoRound(**GRID, **options)(model, calibration=tiny_tokens(16, 32))
    return model, result.blocks


@pytest.mark.parametrize("optimizer", ["adam", "sign"])
@pytest.mark.parametrize("start", ["gptq", "rtn"])
def test_training_lowers_the_error_of_the_first_block_by_a_fifth(optimizer, start):
    _, blocks = _run(optimizer=optimizer, start=start, iterations=40, learning_rate=2e-2)
    assert blocks[0]["trained_error"] < 0.8 * blocks[0]["start_error"]
    assert all(block["trained_error"] < block["start_error"] for block in blocks)


def test_without_iterations_it_is_its_start():
    trained, blocks = _run(iterations=0)
    plain = tiny_model("llama")
    compress.GPTQ(**GRID)(plain, calibration=tiny_tokens(16, 32))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name]), name
    assert "did not improve" in blocks[0]["note"]


def test_a_training_that_makes_the_block_worse_is_thrown_away():
    trained, blocks = _run(iterations=3, learning_rate=1.0, scale_learning_rate=1.0)
    assert blocks[0]["trained_error"] > blocks[0]["start_error"]
    start, _ = _run(iterations=0)
    for name, tensor in start.model.layers[0].state_dict().items():
        assert torch.equal(tensor, trained.model.layers[0].state_dict()[name]), name


def test_minutes_end_the_training_early():
    _, blocks = _run(iterations=100_000, minutes=0.02)
    assert all(0 < block["steps"] < 10_000 for block in blocks)


def test_the_aim_is_the_original_model_so_the_second_block_mends_the_first():
    """The error of the second block, on what the first one now gives it, is measured against the original's output."""
    _, blocks = _run(iterations=0)
    assert blocks[1]["start_error"] > blocks[1]["error"]
