"""Recipes: the shell can parse the scripts, they refuse an empty line, and every TOML file is made of known options."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cllip_fast.train.config import Config, read_toml

RECIPES = Path(__file__).parents[2] / "train" / "recipes"


@pytest.mark.parametrize("script", sorted(RECIPES.glob("*.sh")), ids=lambda path: path.name)
def test_a_script_parses_and_says_how_it_is_used(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    done = subprocess.run(["bash", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")
    for name in (word for line in script.read_text().splitlines() for word in line.split() if word.endswith(".toml")):
        assert name == "FILE.toml" or (RECIPES.parents[1] / name).is_file()


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.name)
def test_a_recipe_is_a_configuration(recipe: Path) -> None:
    assert Config(**read_toml(str(recipe))).name == recipe.stem.removesuffix("_overfit")
