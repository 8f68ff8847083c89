"""A tiny generated data set, its tokenizer, and loaders with small defaults."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cllip_fast.data import Loader, Tokenizer, create_loader, load_tokenizer, make_scenes


@pytest.fixture(scope="session")
def scene_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("scenes") / "set", train=40, val=10, unseen=12, processes=1)


@pytest.fixture(scope="session")
def tokenizer(scene_set: Path) -> Tokenizer:
    return load_tokenizer(scene_set / "tokenizer.json")


@pytest.fixture
def loader(tokenizer: Tokenizer) -> Callable[..., Loader]:
    """`create_loader` with small defaults."""

    def create(spec: str | Path, **changes: Any) -> Loader:
        settings = {
            "tokenizer": tokenizer,
            "batch_size": 4,
            "image_size": 64,
            "text_length": 32,
            "region_length": 8,
            "max_regions": 3,
            "train": False,
        }
        return create_loader(spec, **settings | changes)

    return create
