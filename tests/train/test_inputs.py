"""Runs on either loader: the same batches, resume, faults; each region is evaluated; unreadable texts are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from cllip_fast import extras
from cllip_fast.data import Batch, make_scenes
from cllip_fast.errors import InputError
from cllip_fast.train import main as trainer
from cllip_fast.train.config import parse
from cllip_fast.train.distributed import World
from cllip_fast.train.inputs import create_inputs
from tests.data.painted import jpeg, record, write_shard
from tests.train.test_run import arguments, losses, run

with_dali = pytest.mark.skipif(extras.probe("dali") is None, reason="DALI is not installed")
LEVEL = 1 / 255 / 0.27  # CLIP's standard deviation of the channels
DRAWN = {"crop": "random", "flip": 0.5, "steps": 6, "save_frequency": 3, "val_data": ""}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes with one image whose first tables nobody can use."""
    root = make_scenes(tmp_path_factory.mktemp("scenes") / "scenes", train=40, val=4, unseen=4, processes=1)
    shard = min((root / "train").glob("*.tar"))
    data = bytearray(shard.read_bytes())
    table = data.index(b"\xff\xc4", data.index(b"\xff\xd8\xff"))
    data[table + 5 : table + 21] = b"\xff" * 16
    shard.write_bytes(data)
    return root


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """What the trainer hands to its model from now on."""
    seen: list[Batch] = []
    forward = trainer.forward

    def noted(model: nn.Module, batch: Batch, parts: tuple[str, ...]) -> dict:
        seen.append(batch)
        return forward(model, batch, parts)

    monkeypatch.setattr(trainer, "forward", noted)
    return seen


def counts(folder: Path) -> list[tuple[int, ...]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [tuple(line[f"samples_{name}"] for name in ("seen", "skipped", "total")) for line in lines]


@with_dali
def test_both_loaders_train_on_the_same_batches(
    scenes: Path, tmp_path: Path, batches: list[Batch], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = run(scenes, tmp_path, name="plain", **DRAWN)
    expected = batches[:]
    batches.clear()
    dali = run(scenes, tmp_path, name="dali", loader="dali", loader_threads=1, **DRAWN)
    assert "decoder dali" in capsys.readouterr().out
    assert [batch.keys for batch in batches] == [batch.keys for batch in expected]
    for a, b in zip(batches, expected, strict=True):
        assert (a.captions, a.phrases) == (b.captions, b.phrases)
        for name in ("text", "boxes", "region_text", "region_mask"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert (a.images - b.images).abs().mean((1, 2, 3)).max() <= LEVEL
    assert counts(dali) == counts(plain)
    seen, skipped, total = counts(dali)[-1]
    assert skipped >= 1, "the broken image, in the one epoch that all steps make up"
    assert seen + skipped == total == 48


@with_dali
@pytest.mark.parametrize("loader", ["dali", "plain"])
def test_a_run_on_dali_is_resumed_exactly_on_either_loader(
    scenes: Path, tmp_path: Path, batches: list[Batch], loader: str
) -> None:
    run(scenes, tmp_path, loader="dali", **DRAWN)
    folder, expected = tmp_path / "scenes", batches[3:]
    curve = losses(folder)
    (folder / "checkpoints" / "step_00000006.pt").unlink()
    batches.clear()
    run(scenes, tmp_path, loader=loader, resume="latest", **DRAWN)
    assert [batch.keys for batch in batches] == [batch.keys for batch in expected]
    if loader == "dali":
        assert all(torch.equal(a.images, b.images) for a, b in zip(batches, expected, strict=True))
        assert losses(folder) == curve


def test_dali_that_is_not_there_is_refused(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "probe", lambda name: None)
    with pytest.raises(InputError, match="--loader dali needs dali, which cannot be imported here: pip install"):
        run(scenes, tmp_path, loader="dali")


def tokenizer_with(scenes: Path, path: Path, **names: str) -> Path:
    """The scenes' tokenizer file with some of its tokens renamed."""
    text = (scenes / "tokenizer.json").read_text()
    for old, new in names.items():
        assert f'"<{old}>"' in text
        text = text.replace(f'"<{old}>"', f'"{new}"')
    path.write_text(text)
    return path


def test_a_tokenizer_whose_padding_may_be_text_is_refused_for_a_tower_that_masks_it(
    scenes: Path, tmp_path: Path
) -> None:
    path = tokenizer_with(scenes, tmp_path / "own.json", pad="!")
    with pytest.raises(InputError, match=r"own\.json \(json\) uses id 0 in texts, .* --model tiny masks"):
        run(scenes, tmp_path, tokenizer=path)
    run(scenes, tmp_path, tokenizer=path, model="ViT-Ti-16", image_size=32, steps=1, val_data="")


def test_resuming_with_another_tokenizer_is_refused(scenes: Path, tmp_path: Path) -> None:
    run(scenes, tmp_path, steps=1, val_data="")
    text = (scenes / "tokenizer.json").read_text()
    other = tmp_path / "other.json"
    other.write_text(text + "\n")
    with pytest.raises(InputError, match=r"state has tokenizer json with .* ids, SHA-256 .*, but this loader has json"):
        run(scenes, tmp_path, tokenizer=other, resume="latest", steps=2, val_data="")


def test_evaluation_leaves_no_region_out(scenes: Path, tmp_path: Path) -> None:
    """However many an image has, where training samples a few: the figures are those of `cllip-fast eval`."""
    regions = [{"box": [i, 0, i + 4, 9], "text": "a thing"} for i in range(40)]
    write_shard(tmp_path / "full", [("crowd", jpeg(64, 64), record(64, 64, regions=regions))])
    options = arguments(scenes, tmp_path, val_data=f"full={tmp_path / 'full'}", max_regions=2, batch_size=2)
    inputs = create_inputs(parse(options), World(0, 1, torch.device("cpu"), None))
    (batch,) = inputs.splits["full"]
    assert batch.region_mask.sum() == 40
    assert next(inputs.train.forever()).region_mask.shape == (2, 2)
