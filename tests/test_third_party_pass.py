"""docs/adding-a-pass.md, followed to the letter: its files become an installed package of somebody else's."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "adding-a-pass.md").read_text()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder as pip would leave it: the guide's modules, and metadata with the guide's entry point."""
    folder = tmp_path_factory.mktemp("site")
    files = re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)```", GUIDE, re.DOTALL)
    assert {name for name, _ in files} == {"soften.py", "test_soften.py"}
    for name, code in files:
        (folder / name).write_text(code)
    point = re.search(r'\[project\.entry-points\."(\S+)"\]\n(\S+) = "(\S+)"', GUIDE)
    info = folder / "soften-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: soften\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{point[1]}]\n{point[2]} = {point[3]}\n")
    return folder


def in_site(site, *command):
    path = os.pathsep.join([str(site), str(ROOT)])
    return subprocess.run(
        [sys.executable, *command], cwd=site, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_guides_test_passes_as_written(site):
    done = in_site(site, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_soften.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_a_recipe_with_the_guides_pass_runs_and_reports_it(site, tiny_folder):
    entry = yaml.safe_load(re.search(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)[1])
    (site / "recipe.yaml").write_text(yaml.safe_dump({"model": str(tiny_folder), "benchmark": False, **entry}))
    done = in_site(site, "-m", "compress", "run", "recipe.yaml", "--output", "out")
    assert done.returncode == 0, done.stderr
    report = json.loads(Path(done.stdout.strip().splitlines()[-1]).read_text())
    assert report["stages"][0]["pass"] == "soften"
    assert report["stages"][0]["options"]["share"] == 0.05
    assert report["stages"][0]["blocks"][0]["layers"]["mlp.up_proj"]["moved"] > 0


def test_passes_lists_it_with_its_option(site):
    done = in_site(site, "-m", "compress", "passes", "soften")
    assert done.returncode == 0, done.stderr
    assert "share" in done.stdout
    assert "How far, from 0" in done.stdout
