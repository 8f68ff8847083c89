"""Options: defaults beneath a TOML file beneath flags, and clear refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from cllip_fast.errors import InputError
from cllip_fast.train.config import LOSSES, Config, parse


def test_flags_go_before_the_file_which_goes_before_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('steps = 7\n[optimization]\nlr = 1\nbatch-size = 9\n[losses]\nlosses = "patch,clip"\n')
    config = parse(["--config", str(file), "--steps", "3"])
    assert (config.steps, config.lr, config.batch_size, config.warmup) == (3, 1.0, 9, Config().warmup)
    assert config.parts == ("clip", "patch")
    assert isinstance(config.lr, float)


def test_all_means_every_loss() -> None:
    assert Config().parts == LOSSES


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("stepz = 3", r"'stepz', which is no option of the trainer; did you mean steps\?"),
        ('steps = "three"', "steps"),
        ("steps = true", "True"),
        ("steps = [", "not TOML"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, text: str, names: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(InputError, match=names):
        parse(["--config", str(file)])


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(InputError, match=r"absent\.toml"):
        parse(["--config", "absent.toml"])


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"losses": "clip,regoin"}, "regoin"),
        ({"steps": 0}, "--steps is 0"),
        ({"batch_size": -1}, "--batch-size is -1"),
        ({"lr": float("nan")}, "--lr is nan"),
        ({"precision": "fp12"}, "fp12"),
    ],
)
def test_bad_values_are_refused_by_name(options: dict, names: str) -> None:
    with pytest.raises(InputError, match=names):
        Config(**options)


def test_every_option_survives_its_dict() -> None:
    config = Config(steps=3, name="x")
    assert Config(**config.to_dict()) == config


def test_recipes_are_readable() -> None:
    recipes = sorted((Path(__file__).parents[2] / "train" / "recipes").glob("*.toml"))
    assert recipes
    for recipe in recipes:
        parse(["--config", str(recipe)])
