"""Zero-shot segmentation and SugarCrepe by the command, against plain loops over a random model's features."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

import cllip_fast
from cllip_fast.cli import main
from tests.saved_run import picture, save_run

NAMES = ["red circle", "blue star", "void", "green ring", "wall"]
IGNORED = 2


def run(*arguments: str | Path) -> dict[str, float | None]:
    out = Path(arguments[1]) / "out.json"  # in the run's folder
    assert main(["eval", "--device", "cpu", "--out", str(out), *map(str, arguments)]) == 0
    return json.loads(out.read_text())["metrics"]


def test_upsampling_is_interpolate(tmp_path: Path) -> None:
    """Of a square image, which needs no padding."""
    model = cllip_fast.load(save_run(tmp_path), device="cpu")
    image = picture(45, 45, 1)
    small = model.similarity_map(image, NAMES)
    expected = interpolate(small[None], (45, 45), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(model.similarity_map(image, NAMES, size=(45, 45)), expected, rtol=0, atol=1e-5)


def test_segmentation_is_that_of_loops(tmp_path: Path) -> None:
    folder = save_run(tmp_path)
    generator = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for number, (width, height) in enumerate([(40, 30), (21, 33), (32, 32)]):
        picture(width, height, number).save(tmp_path / "images" / f"{number}.png")
        mask = generator.choice([0, 1, IGNORED, 3], (height, width)).astype(np.uint8)
        Image.fromarray(mask).save(tmp_path / "masks" / f"{number}.png")
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    given = ("--images", tmp_path / "images", "--masks", tmp_path / "masks", "--names", tmp_path / "names.txt")
    found = run("--checkpoint", folder, "--task", "segmentation", *given, "--ignore", IGNORED)

    model = cllip_fast.load(folder, device="cpu")
    table = np.zeros((5, 5), dtype=int)  # true, predicted
    for number in range(3):
        size = Image.open(tmp_path / "images" / f"{number}.png").size
        texts = model.encode_text([f"a photo of a {name}." for name in NAMES])
        maps = model.similarity_map(tmp_path / "images" / f"{number}.png", texts, size=size).double().numpy()
        maps[IGNORED] = -2
        mask = np.asarray(Image.open(tmp_path / "masks" / f"{number}.png"))
        for row in range(size[1]):
            for column in range(size[0]):
                if mask[row, column] != IGNORED:
                    table[mask[row, column], maps[:, row, column].argmax()] += 1
    union = table.sum(0) + table.sum(1) - table.diagonal()
    assert found["miou"] == pytest.approx((table.diagonal()[union > 0] / union[union > 0]).mean(), abs=1e-6)
    assert found["pixel_accuracy"] == pytest.approx(table.trace() / table.sum(), abs=1e-6)
    assert np.count_nonzero(table.sum(0)) > 1, "more than one class is predicted"


def test_sugarcrepe_is_that_of_loops(tmp_path: Path, coco: Path) -> None:
    folder, file = save_run(tmp_path), coco / "annotations" / "sugar_crepe.json"
    kinds = json.loads(file.read_text())
    few = {kind: (list(pairs.values()) if isinstance(pairs, dict) else pairs)[:20] for kind, pairs in kinds.items()}
    (tmp_path / "few.json").write_text(json.dumps(few))
    given = ("--task", "compositional", "--data", tmp_path / "few.json", "--images", coco / "images")
    found = run("--checkpoint", folder, *given)
    model = cllip_fast.load(folder, device="cpu")
    shares = []
    for kind, pairs in few.items():
        right = 0
        for pair in pairs:
            image = model.encode_image(coco / "images" / pair["filename"])[0]
            true, wrong = model.encode_text([pair["caption"], pair["negative_caption"]])
            right += float(image @ true) > float(image @ wrong)
        shares.append(right / len(pairs))
        assert found[kind] == pytest.approx(shares[-1], abs=1e-6), kind
    assert found["compositional"] == pytest.approx(np.mean(shares), abs=1e-6)
    assert 0 < np.mean(shares) < 1
