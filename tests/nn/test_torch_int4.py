"""torch's product with 4-bit codes, where our kernel was not built: against the dequantized weight; what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch

import compress
from compress.maths.grid import QuantSpec, find_params, quantize
from compress.nn import cpu, torch_int4
from compress.nn.kernels import choose
from compress.nn.quant_linear import QuantLinear
from compress.nn.running import served
from compress.testing import tiny_model


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "library", lambda: None)


def layer_of(rows: int = 48, columns: int = 128, group: int = 32, bias: bool = False, **given: object) -> QuantLinear:
    torch.manual_seed(rows + columns)
    weight = torch.randn(rows, columns).bfloat16()
    spec = QuantSpec(**{"bits": 4, "group_size": group, "symmetric": True, "scale_dtype": "bfloat16", **given})
    scale, zero = find_params(weight, spec)
    offset = torch.linspace(-1, 1, rows) if bias else None
    layer = QuantLinear.from_codes(quantize(weight, scale, zero, spec), scale, zero, spec, offset, torch.bfloat16)
    layer.exact = False
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "columns", "group"), [(48, 128, 32), (16, 64, 64), (80, 256, 128), (32, 512, 256)])
def test_the_product_is_that_of_the_dequantized_weight_to_bfloat16(
    rows: int, columns: int, group: int, bias: bool
) -> None:
    layer = layer_of(rows, columns, group, bias)
    for shape in ((columns,), (1, columns), (2, 5, columns), (1, 100, columns)):
        x = torch.randn(shape).bfloat16()
        assert choose(layer, x).name == "torch int4"
        found = layer(x)
        expected = x.float() @ layer.dequantize(torch.float32).t() + (0 if layer.bias is None else layer.bias.float())
        assert found.shape == expected.shape
        assert found.dtype == torch.bfloat16
        assert (found.float() - expected).norm() < 4e-3 * expected.norm()


def test_a_layer_that_is_filled_anew_or_copied_is_reordered_anew() -> None:
    layer, other = layer_of(), layer_of()
    x = torch.randn(1, 128).bfloat16()
    before = layer(x)
    assert isinstance(copy.deepcopy(layer).prepared, torch_int4.Reordered | None)
    assert torch.equal(copy.deepcopy(layer)(x), before)
    other.weight_scale = other.weight_scale * 2
    layer.load_state_dict(other.state_dict())
    layer.weight_scale = other.weight_scale
    torch.testing.assert_close(layer(x), before * 2)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"bits": 8}, "4 bits"),
        ({"symmetric": False}, "symmetric"),
        ({"scale_dtype": "float16"}, "bfloat16"),
        ({"group": 16}, "groups of 32"),
        ({"rows": 24}, "multiples of 16"),
    ],
)
def test_what_it_cannot_hold_without_loss_says_why_and_runs_otherwise(given: dict[str, object], word: str) -> None:
    layer = layer_of(**given)
    assert word in (torch_int4.why_not(layer) or "")
    assert choose(layer, torch.randn(1, 128).bfloat16()).name == "torch"


def test_other_dtypes_gradients_and_exact_layers_are_left_alone() -> None:
    layer = layer_of()
    assert choose(layer, torch.randn(1, 128)).name == "torch"
    assert choose(layer, torch.randn(1, 128).bfloat16().requires_grad_()).name == "torch"
    layer.exact = True
    assert choose(layer, torch.randn(1, 128).bfloat16()).name == "torch"


def test_a_whole_model_runs_through_it_and_doctor_can_say_so() -> None:
    model = tiny_model("llama", hidden_size=64, intermediate_size=96).to(torch.bfloat16)
    compress.RTN(bits=4, group_size=32)(model)
    ids = torch.arange(3, 12)[None]
    with torch.inference_mode():
        expected = model(input_ids=ids).logits.float()
        for layer in model.modules():
            if isinstance(layer, QuantLinear):
                layer.exact = False
                assert str(served(layer)).startswith("torch's 4-bit product")
        found = model(input_ids=ids).logits.float()
    assert (found - expected).norm() < 0.03 * expected.norm()
    assert all(isinstance(x.prepared, torch_int4.Reordered) for x in model.modules() if isinstance(x, QuantLinear))
