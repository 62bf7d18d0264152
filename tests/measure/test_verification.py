import pytest
import torch
from transformers import AutoModelForCausalLM

from compress.errors import CompressError
from compress.measure import verification
from compress.testing import tiny_tokens

pytestmark = pytest.mark.usefixtures("fresh_processes")


def test_the_folder_reloaded_gives_the_logits_of_the_model_in_memory(pair, tmp_path):
    ids = tiny_tokens(samples=2, length=10)
    model = AutoModelForCausalLM.from_pretrained(pair[0]).eval()
    with torch.no_grad():
        logits = torch.cat([model(row).logits for row in ids.split(1)])
    found = verification.verify(pair[0], ids, logits, dtype=torch.float32, workdir=tmp_path)
    assert found.reloaded
    assert found.by == "transformers"
    assert found.max_logit_difference <= 1e-5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("moved", "dtype", "allowed"),
    [
        (0.005, torch.float32, False),
        (0.005, torch.bfloat16, True),
        (0.02, torch.bfloat16, False),
        (0.0, torch.float32, True),
    ],
)
def test_a_difference_beyond_the_tolerance_is_an_error(monkeypatch, tmp_path, moved, dtype, allowed):
    monkeypatch.setattr(verification, "plain_output", lambda *args, **kwargs: torch.zeros(1, 2, 3))
    output = torch.zeros(1, 2, 3)
    output[0, 1, 2] = moved
    ids = torch.zeros(1, 2, dtype=torch.long)
    if allowed:
        assert verification.verify(
            tmp_path, ids, output, dtype=dtype, workdir=tmp_path
        ).max_logit_difference == pytest.approx(moved)
    else:
        with pytest.raises(CompressError, match="not verified"):
            verification.verify(tmp_path, ids, output, dtype=dtype, workdir=tmp_path)


def test_logits_that_are_not_numbers_are_not_verified(monkeypatch, tmp_path):
    monkeypatch.setattr(verification, "plain_output", lambda *args, **kwargs: torch.full((1, 2, 3), float("nan")))
    with pytest.raises(CompressError, match="not verified"):
        verification.verify(
            tmp_path, torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, 3), dtype=torch.float32, workdir=tmp_path
        )


def test_the_check_refuses_to_run_with_this_package_imported(pair, tmp_path, monkeypatch):
    """The child is told to import `compress` first: its result must then be refused."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import compress\n")
    monkeypatch.setenv("PYTHONPATH", str(site))
    with pytest.raises(CompressError, match="compress was imported"):
        verification.plain_output(pair[0], tiny_tokens(samples=1, length=4), tmp_path / "work")
