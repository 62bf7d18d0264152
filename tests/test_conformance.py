"""Every registered pass, on every family: the registry is the matrix, so a new pass is tested once it is listed."""

import warnings

import pytest
import torch

from compress.errors import StartError
from compress.registry import PASSES
from compress.testing import FAMILIES, check_pass, small_options, tiny_model

PASS_NAMES = PASSES.names()
#: Families that a pass refuses, and a word of the reason.
REFUSED = {
    ("rotate", "gemma3"): "computes something else",
    ("rotate", "gpt_oss"): "no linear layer",
    ("rotate", "mixtral"): "no linear layer",
    ("rotate", "qwen3_moe"): "no linear layer",
    ("rotate", "bert"): "no head",
    ("rotate", "roberta"): "not given a sum of embeddings",
    ("rotate", "distilbert"): "no head",
    ("rotate", "modernbert"): "not given a sum of embeddings",
    ("rotate", "t5"): "2 stacks of blocks",
}


#: Training takes longest, and looks at fewer things of a family: one of each kind, and those that are refused.
TRAINED_ON = ("llama", "gemma3", "gpt2", "mixtral", "distilbert", "bert", "t5", "vit")
#: Families whose blocks hold the same kinds of layers, called the same way, as another's: to a pass that sees no more
#: than a block's layers they are that one again. `gptq` and `rtn` stand for such passes, with a text and without.
LIKE = ("qwen3", "mistral", "opt", "roberta", "qwen3_moe")
ALONE = ("gptq", "rtn")


def _again(name, family):
    """Whether another cell of the table runs the same code: of a pass that changes weights, and neither removes nor
    rescales, on a family that is like another."""
    cls = PASSES.get(name)
    of_layers = cls.changes_weights and not (cls.structural or cls.rescales or cls.changes_outside)
    return of_layers and family in LIKE and name not in ALONE


CASES = [
    pytest.param(name, family, marks=pytest.mark.slow) if _again(name, family) else (name, family)
    for name in PASS_NAMES
    for family in (TRAINED_ON if PASSES.get(name).needs_training else FAMILIES)
]


@pytest.mark.parametrize(("name", "family"), CASES)
def test_the_pass_conforms(name, family):
    cls = PASSES.get(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if (name, family) in REFUSED:
            model = tiny_model(family)
            before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
            with pytest.raises(StartError, match=REFUSED[name, family]):
                cls(**small_options(cls))(model)
            assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
        else:
            check_pass(cls(**small_options(cls)), family)


@pytest.mark.parametrize("name", PASS_NAMES)
def test_every_option_of_the_pass_is_described(name):
    for option, field in PASSES.get(name).model_fields.items():
        assert field.description, f"{name}.{option} has no description"


def test_check_pass_fails_for_a_pass_that_changes_nothing():
    from compress.passes.base import BlockPass

    class Idle(BlockPass):
        name = "idle"

        def compress_block(self, block, calibration):
            return {}

    with pytest.raises(AssertionError, match="changed nothing"):
        check_pass(Idle())


@pytest.mark.parametrize("name", PASS_NAMES)
def test_the_class_of_the_pass_is_a_public_name(name):
    import compress

    cls = PASSES.get(name)
    assert getattr(compress, cls.__name__) is cls
