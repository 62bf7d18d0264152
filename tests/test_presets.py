"""`quantize`: the passes that its presets stand for, at which bits and on which grid."""

import pytest

import compress


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"preset": "fast"}, [("rtn", None)]),
        ({"preset": "fast", "grid": "trellis"}, [("rtn", "trellis")]),
        ({}, [("autoround", None)]),
        ({"grid": "trellis"}, [("gptq", "trellis")]),
        ({"bits": 8}, [("gptq", None)]),
        ({"preset": "best"}, [("gptq", "trellis"), ("llm_qat", None)]),
        ({"preset": "best", "grid": "integer"}, [("gptq", None), ("llm_qat", None)]),
        ({"preset": "best", "symmetric": False}, [("gptq", None), ("llm_qat", None)]),
        ({"preset": "best", "bits": 8}, [("gptq", None)]),
    ],
)
def test_a_preset_stands_for_these_passes_on_this_grid(options, expected):
    steps = compress.Quantize(**options).stands_for()
    assert [(step.name, getattr(step, "grid", None)) for step in steps] == expected
    assert steps[0].bits == options.get("bits", 4)


@pytest.mark.parametrize(
    ("grid", "bits", "written", "dampening"),
    [("trellis", 2, 450, 0.2), ("trellis", 3, 450, 0.2), ("trellis", 4, 300, 0.0), ("integer", 3, 300, 0.0)],
)
def test_best_writes_a_part_of_its_text_and_dampens_coarse_trellises(grid, bits, written, dampening):
    training = compress.Quantize(preset="best", grid=grid, bits=bits, tokens=900).stands_for()[1]
    assert (training.tokens, training.generated, training.dampening) == (900, written, dampening)
