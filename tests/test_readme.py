"""What README says works: its recipe loads and plans, its Python runs, its files exist."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from compress.planning import plan
from compress.recipe import Recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def block(language):
    return re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)[1]


def test_the_recipe_is_ten_lines_or_so_and_plans(tmp_path):
    text = block("yaml")
    assert len(text.splitlines()) <= 12
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    assert [pass_.name for pass_ in recipe.passes] == ["wanda", "gptq"]
    assert 0 < plan(recipe).weights_bytes < 4_000_000


def test_the_python_call_compresses_the_embedded_model(capsys):
    exec(compile(block("python"), "README.md", "exec"), {})
    coverage, error = (float(word) for word in capsys.readouterr().out.split())
    assert coverage == 1.0
    assert 0 < error < 0.1


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_every_file_that_is_linked_exists(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "recipes").glob("*.yaml")))
def test_every_ready_recipe_loads_and_plans(name):
    recipe = Recipe.load(ROOT / "recipes" / name)
    package = {"gguf-q4.yaml": "llama_cpp", "nf4-bitsandbytes.yaml": "bitsandbytes", "onnx-int4.yaml": "onnx"}.get(name)
    if package is not None and find_spec(package) is None:
        pytest.skip(f"{package} is of an extra, and is not installed")
    if not recipe.model.startswith("builtin:"):
        pytest.skip("its model comes from a hub")
    assert plan(recipe).weights_bytes > 0


def test_the_recipe_reference_is_what_the_code_says():
    from compress.describe import reference

    assert (ROOT / "docs" / "recipe-reference.md").read_text() == reference()
