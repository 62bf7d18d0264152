import shutil

import pytest
import torch
from torch.nn import functional

from compress.maths.grid import QuantSpec, find_params, quantize
from compress.nn import cpu, kernels
from compress.nn.quant_linear import QuantLinear
from compress.testing import outputs, tiny_model, tiny_tokens

built = pytest.mark.skipif(cpu.library() is None, reason="the kernel is not built here, or the processor lacks AVX2")
GRIDS = [(bits, group, symmetric) for bits in (2, 3, 4, 8) for group in (32, 64, 96, -1) for symmetric in (True, False)]


def _layer(bits: int, group: int, symmetric: bool, rows: int = 37, columns: int = 192, scale: str = "float16"):
    torch.manual_seed(0)
    spec = QuantSpec(bits, group, symmetric, scale)
    weight = torch.randn(rows, columns)
    found, zero = find_params(weight, spec)
    layer = QuantLinear.from_codes(quantize(weight, found, zero, spec), found, zero, spec)
    layer.exact = False
    return layer


def _product(layer: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    """In float64, from the codes."""
    codes, scale, zero = layer.codes()
    codes = codes.double().unflatten(1, (scale.shape[1], -1))
    weight = (codes - (0 if zero is None else zero.double().unsqueeze(2))) * scale.double().unsqueeze(2)
    return functional.linear(x.double(), weight.flatten(1))


def _off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@built
@pytest.mark.parametrize("level", cpu.LEVELS)
@pytest.mark.parametrize(("bits", "group", "symmetric"), GRIDS)
def test_the_product_is_that_of_float64_to_the_rounding_of_the_input_dtype(bits, group, symmetric, level):
    layer = _layer(bits, group, symmetric)
    for many in (1, 3, 5, cpu.MANY + 1):
        x = torch.randn(many, 192)
        for dtype, most in ((torch.float32, 2e-6), (torch.bfloat16, 6e-3)):
            given = x.to(dtype)
            assert cpu.fits(layer, given)
            assert _off(cpu.multiply(layer, given, level), _product(layer, given)) < most


@built
def test_scales_of_every_dtype_are_read():
    x = torch.randn(2, 192)
    for scale in ("float16", "bfloat16", "float32"):
        layer = _layer(4, 64, True, scale=scale)
        assert cpu.fits(layer, x)
        assert _off(cpu.multiply(layer, x), _product(layer, x)) < 2e-6


@built
def test_the_number_of_threads_changes_no_bit():
    layer, x = _layer(4, 32, False, rows=130), torch.randn(3, 192)
    assert cpu.fits(layer, x)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = cpu.multiply(layer, x)
        torch.set_num_threads(2)
        assert torch.equal(cpu.multiply(layer, x), one)
    finally:
        torch.set_num_threads(before)


@built
def test_new_tensors_in_a_layer_are_seen():
    layer, other, x = _layer(4, 64, True), _layer(4, 64, True), torch.randn(1, 192)
    cpu.fits(layer, x)
    cpu.multiply(layer, x)
    other.weight_packed = other.weight_packed.flip(0)
    layer.load_state_dict(other.state_dict(), assign=True)
    assert _off(kernels.choose(layer, x)(layer, x), _product(other, x)) < 2e-6


@built
def test_a_model_that_need_not_be_exact_runs_through_it_and_an_exact_one_does_not():
    import compress

    model, tokens = tiny_model("llama"), tiny_tokens()
    compress.RTN(bits=4, group_size=32)(model)
    exact = outputs(model, tokens)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    x = torch.randn(1, layers[0].in_features)
    assert kernels.choose(layers[0], x).name == "torch"
    for layer in layers:
        layer.exact = False
    assert kernels.choose(layers[0], x).name == "cpu"
    assert _off(outputs(model, tokens), exact.double()) < 1e-4


def test_layers_it_cannot_serve_say_why():
    assert "multiples of 32" in str(cpu.why_not(_layer(4, 16, True))) or cpu.library() is None
    x = torch.randn(1, 192)
    layer = _layer(4, 64, True)
    assert not cpu.fits(layer, x.double())
    assert not cpu.fits(layer, x.requires_grad_())
    layer.exact = True
    assert not cpu.fits(layer, x.detach())


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler here")
def test_where_there_is_a_compiler_the_kernel_was_built():
    from importlib.machinery import EXTENSION_SUFFIXES
    from pathlib import Path

    assert any(Path(cpu.__file__).with_name(f"_cpu{suffix}").exists() for suffix in EXTENSION_SUFFIXES)
