"""`cllip-fast eval` on a saved run and on OpenCLIP's weights: what it prints and writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cllip_fast
from cllip_fast.cli import main
from cllip_fast.data import create_loader
from cllip_fast.evaluate import evaluate
from cllip_fast.evaluate.table import COUNTS
from cllip_fast.models import create_model
from cllip_fast.train import checkpoint
from tests.data.painted import record, write_shard
from tests.ranks import on_ranks
from tests.saved_run import CLASSES, LENGTHS, picture, save_run


def run(*arguments: str | Path) -> int:
    return main(["eval", "--device", "cpu", *map(str, arguments)])


def metrics_of(path: Path) -> dict[str, float | None]:
    return json.loads(path.read_text())["metrics"]


def test_shards_give_the_trainers_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_run(tmp_path)
    assert run("--checkpoint", folder, "--data", tmp_path / "data" / "train", "--batch-size", 2) == 0
    printed = capsys.readouterr().out
    assert "| region recognition, top-1" in printed
    assert f"wrote {folder / 'eval_shards.json'}" in printed
    model = cllip_fast.load(folder, device="cpu")
    loader = create_loader(tmp_path / "data" / "train", tokenizer=model.tokenizer, batch_size=3, image_size=32,
                           max_regions=4, train=False, **LENGTHS)  # fmt: skip
    expected = evaluate(model.model, loader, tokenizer=model.tokenizer, classes=CLASSES, progress=False, **LENGTHS)
    found = metrics_of(folder / "eval_shards.json")
    assert found.pop("skipped") == found.pop("regions_skipped") == 0
    assert found == pytest.approx(expected)
    assert expected["regions"] == 12, "no region is left out"


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    """A photograph that cannot be read, a box outside, and what a centred crop does not see; on two ranks as on one."""
    folder = save_run(tmp_path, crop="center")
    samples = []
    for number, name in enumerate(("a", "b", "c", "d", "e")):
        picture(120, 40, number).save(tmp_path / "photo.jpg")
        boxes = [[50, 5, 70, 30], [0, 0, 20, 20], [300, 300, 310, 310]][: 2 + (number == 1)]
        regions = [{"box": box, "text": CLASSES[0]} for box in boxes]
        data = b"no image" if name == "d" else (tmp_path / "photo.jpg").read_bytes()
        samples.append((name, data, record(120, 40, captions=[CLASSES[number % 4]], regions=regions)))
    write_shard(tmp_path / "data" / "some", samples)
    out = tmp_path / "out.json"
    assert run("--checkpoint", folder, "--data", tmp_path / "data" / "some", "--batch-size", 1, "--out", out) == 0
    found = metrics_of(out)
    counts = ("images", "skipped", "regions", "regions_skipped")
    assert [found[name] for name in counts] == [4, 1, 4, 7]
    assert "shards_skipped" not in found
    on_ranks(2, on_a_rank, folder, tmp_path, "some")
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(found, abs=1e-6)
    task = ("--task", "classification", "--data", tmp_path / "data" / "some")
    assert run("--checkpoint", folder, *task, "--out", out) == 0
    assert [metrics_of(out)[name] for name in counts[:2]] == [4, 1]

    (tmp_path / "data" / "some" / "cut.tar").write_bytes(b"x" * 100)  # one shard among others
    assert run("--checkpoint", folder, "--data", tmp_path / "data" / "some", "--batch-size", 1, "--out", out) == 0
    assert metrics_of(out) == found | {"shards_skipped": 1}


def test_a_broken_model_is_right_nowhere_and_its_json_is_valid(tmp_path: Path) -> None:
    """Weights of NaN; JSON knows no NaN, and strict readers refuse what Python would write for it."""
    folder = save_run(tmp_path)
    (file,) = (folder / "checkpoints").iterdir()
    state = checkpoint.read(file)
    for weights in state["model"].values():
        weights.fill_(torch.nan)
    torch.save(state, file)
    assert run("--checkpoint", folder, "--data", tmp_path / "data" / "train") == 0
    found = json.loads((folder / "eval_shards.json").read_text(), parse_constant=pytest.fail)["metrics"]
    shares = {name: value for name, value in found.items() if name not in COUNTS}
    assert set(shares.values()) == {0}


def test_the_file_is_written_whoever_reads_the_table(tmp_path: Path) -> None:
    folder = save_run(tmp_path)
    command = [sys.executable, "-m", "cllip_fast.cli", "eval", "--checkpoint", folder]
    command += ["--data", tmp_path / "data" / "train", "--device", "cpu"]
    reading, writing = os.pipe()
    os.close(reading)  # as `| head -1` may
    subprocess.run(command, stdout=writing, stderr=subprocess.DEVNULL, check=False)
    os.close(writing)
    assert metrics_of(folder / "eval_shards.json")["images"] == 3


def test_a_folder_is_no_file_to_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said at once, not after the evaluation."""
    assert run("--checkpoint", tmp_path / "nowhere", "--data", tmp_path, "--out", tmp_path) == 2
    assert f"--out {tmp_path} is a folder, expected a file to write" in capsys.readouterr().err


def on_a_rank(rank: int, world_size: int, folder: Path, out: Path, data: str = "train") -> None:
    import torch.distributed as dist

    from cllip_fast.evaluate.commands import TASKS
    from cllip_fast.train.distributed import World

    world = World(rank, world_size, torch.device("cpu"), dist.group.WORLD)
    options = type("Options", (), {"data": [str(folder.parents[1] / "data" / data)], "names": None,
                                   "batch_size": 1, "workers": 0})  # fmt: skip
    metrics = TASKS["shards"].run(cllip_fast.load(folder, device="cpu"), options, world)
    (out / f"{rank}.json").write_text(json.dumps(metrics))


def test_ranks_agree(tmp_path: Path) -> None:
    folder = save_run(tmp_path)
    run("--checkpoint", folder, "--data", tmp_path / "data" / "train")
    on_ranks(2, on_a_rank, folder, tmp_path)
    alone = metrics_of(folder / "eval_shards.json")
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(alone, abs=1e-6)


def class_folders(root: Path) -> Path:
    for seed, name in enumerate(("red_circle", "blue_star", "green_ring")):
        (root / name).mkdir(parents=True)
        for k in range(2):
            picture(60, 50, 10 * seed + k).save(root / name / f"{k}.jpg")
    (root / "green_ring" / "broken.jpg").write_bytes(b"no image")
    return root


def test_folders_and_shards_classify_alike(tmp_path: Path) -> None:
    folder, photos = save_run(tmp_path), class_folders(tmp_path / "photos")
    assert run("--checkpoint", folder, "--task", "classification", "--data", photos, "--templates", "plain") == 0
    found = metrics_of(folder / "eval_classification.json")
    assert (found["images"], found["skipped"]) == (6, 1)

    samples = []
    for path in sorted(photos.glob("*/[01].jpg")):
        facts = record(60, 50, captions=[path.parent.name.replace("_", " ")], regions=[])
        samples.append((f"{path.parent.name}{path.stem}", path.read_bytes(), facts))
    write_shard(tmp_path / "sharded", samples)
    (tmp_path / "names.txt").write_text("blue star\ngreen ring\nred circle\n")
    out = tmp_path / "sharded.json"
    assert run("--checkpoint", folder, "--task", "classification", "--data", tmp_path / "sharded", "--templates",
               "plain", "--names", tmp_path / "names.txt", "--out", out) == 0  # fmt: skip
    assert metrics_of(out) == found | {"skipped": 0}


def test_files_are_evaluated_as_stored(tmp_path: Path) -> None:
    """As shards are, which hold the same bytes, and as a mask lies on its image: EXIF turns nothing."""
    folder = save_run(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("plain", "turned"):
        for name in ("red circle", "blue star"):
            (tmp_path / kind / "images" / name).mkdir(parents=True)
            (tmp_path / kind / "masks" / name).mkdir(parents=True)
            for seed in range(4):
                image = picture(60, 40, 10 * len(name) + seed)
                given = {"exif": exif} if kind == "turned" else {}
                image.save(tmp_path / kind / "images" / name / f"{seed}.jpg", **given)
                mask = Image.fromarray((np.arange(40 * 60).reshape(40, 60) // 300 % 4).astype(np.uint8))
                mask.save(tmp_path / kind / "masks" / name / f"{seed}.png")
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    found = {}
    for kind in ("plain", "turned"):
        data, out = tmp_path / kind, tmp_path / "out.json"
        masks = ("--images", data / "images", "--masks", data / "masks", "--names", tmp_path / "names.txt")
        assert run("--checkpoint", folder, "--task", "segmentation", *masks, "--out", out) == 0
        found[kind] = [metrics_of(out)]
        assert run("--checkpoint", folder, "--task", "classification", "--data", data / "images", "--out", out) == 0
        found[kind].append(metrics_of(out))
    assert found["turned"] == found["plain"]
    model, photo = cllip_fast.load(folder, device="cpu", exif=False), tmp_path / "turned" / "images" / "red circle"
    assert torch.equal(model.preprocess(photo / "0.jpg"), model.preprocess(Image.open(photo / "0.jpg")))


def test_openclip_weights_classify_as_openclip_does(tmp_path: Path) -> None:
    """The model in the file, OpenCLIP's tokens, mean of templates: against the plain computation with our own tower,
    which tests/interchange proves equal to OpenCLIP's."""
    torch.manual_seed(0)
    sizes = {
        "embed_dim": 12,
        "vision_width": 16,
        "vision_depth": 1,
        "vision_heads": 2,
        "text_width": 8,
        "text_depth": 1,
        "text_heads": 2,
    }
    clip = create_model("ViT-B-32", image_size=64, region="roi_align", **sizes)
    from cllip_fast.interchange import export

    export(clip, tmp_path / "clip", "openclip")
    with pytest.MonkeyPatch.context() as patch:
        from cllip_fast.models import PRESETS, ModelConfig

        patch.setitem(PRESETS, "small", ModelConfig.from_dict(clip.config.to_dict() | {"name": "small"}))
        model = cllip_fast.load(tmp_path / "clip", device="cpu", model="small")
        assert model.crop == "center"
        photos = class_folders(tmp_path / "photos")
        out = tmp_path / "out.json"
        assert run("--checkpoint", tmp_path / "clip", "--model", "small", "--task", "classification", "--data", photos,
                   "--templates", "openai", "--out", out) == 0  # fmt: skip
    assert metrics_of(out)["images"] == 6
    pixels = model.preprocess(photos / "red_circle" / "0.jpg")[None]
    with torch.no_grad():
        expected = torch.nn.functional.normalize(clip.eval().encode_image(pixels), dim=-1)
    torch.testing.assert_close(model.encode_pixels(pixels), expected)


def test_segmentation_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_run(tmp_path)
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    picture(64, 48, 3).save(tmp_path / "images" / "one.jpg")
    Image.fromarray((np.arange(48 * 64).reshape(48, 64) % 3).astype(np.uint8)).save(tmp_path / "masks" / "one.png")
    (tmp_path / "names.txt").write_text("red circle\nblue star\ngreen ring\n")
    given = ("--checkpoint", folder, "--task", "segmentation", "--images", tmp_path / "images")
    assert run(*given, "--masks", tmp_path / "masks", "--names", tmp_path / "names.txt") == 0
    assert 0 < metrics_of(folder / "eval_segmentation.json")["pixel_accuracy"] < 1
    assert run(*given) == 2
    assert "--task segmentation needs --masks" in capsys.readouterr().err
    assert run("--checkpoint", folder, "--data", tmp_path, "--templates", "photo") == 2
    assert "--task shards has no use for --templates" in capsys.readouterr().err


COCO = Path(__file__).parents[3] / "shared" / "data" / "coco"


@pytest.mark.skipif(not COCO.is_dir(), reason="../shared/data/coco is not beside this checkout")
def test_sugarcrepe_on_photographs(tmp_path: Path) -> None:
    folder = save_run(tmp_path)
    pairs = COCO / "annotations" / "sugar_crepe.json"
    given = ("--task", "compositional", "--data", pairs, "--images", COCO / "images")
    assert run("--checkpoint", folder, *given) == 0
    content = json.loads(pairs.read_text())
    found = metrics_of(folder / "eval_compositional.json")
    assert found["images"] == sum(map(len, content.values()))
    assert found["skipped"] == 0
    assert all(0 < found[kind] < 1 for kind in content)
