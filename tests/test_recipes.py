"""Every ready recipe does what it says, on a stand-in for its model and a little text."""

from pathlib import Path

import pytest

import compress
from compress.recipe import Recipe
from compress.testing import save_tiny

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), hidden_size=64, intermediate_size=128, num_hidden_layers=2)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipe_runs_and_its_result_is_verified(path, stand_in, tmp_path):
    asked = Recipe.load(path)
    overrides = ["data.calibration.samples=4", "data.calibration.length=32", "benchmark=false"]
    for role in ("calibration", "training", "evaluation"):
        if role == "calibration" or getattr(asked.data, role) is not None:
            overrides += [f"data.{role}.source=builtin:tiny", f"data.{role}.samples=8", f"data.{role}.length=32"]
    if "- quantize:" in path.read_text():
        overrides.append("passes.quantize.tokens=512")
    recipe = Recipe.load(path, overrides, model=str(stand_in), output=str(tmp_path / "run"))
    report = compress.run(recipe)
    assert report.verified.reloaded
    assert [stage.pass_ for stage in report.stages] == [step.name for step in recipe.passes]
    least = [0 if step.structural else 0.9 for step in recipe.passes]  # what is removed is as much as was asked for
    assert all(stage.coverage > share for stage, share in zip(report.stages, least, strict=True))
