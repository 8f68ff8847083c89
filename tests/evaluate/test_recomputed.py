"""`cllip-fast eval --task shards` against the same metrics computed anew (`recomputed.py`)."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from PIL import Image

import cllip_fast
from cllip_fast.cli import main
from cllip_fast.data import load_tokenizer, read_dataset_info, train_bpe
from cllip_fast.train.checkpoint import Checkpoints
from cllip_fast.train.config import Config
from tests.data.painted import record, write_shard
from tests.evaluate.recomputed import read_shards, recompute
from tests.saved_run import small_model

METRICS = {f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)}
METRICS |= {f"{way}_r{k}" for way in ("r2t", "t2r") for k in (1, 10)}
METRICS |= {f"{task}_{value}" for task in ("grounding", "referring") for value in ("acc50", "iou")}
METRICS |= {"recognition_top1", "recognition_mean_class", "pointing"}
CLASSES = ["person holding a goose feather", "a phrase that no region has"]


def save_model(run: Path, data: Path) -> Path:
    """A random model for `data`'s tokenizer. Its features are spread out: chance would hide many a mistake."""
    info = read_dataset_info(data)
    model = small_model(load_tokenizer(info.tokenizer_path).vocab_size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("stem.weight", "tokens.weight", "qkv.weight")):
                parameter.mul_(8)
    config = Config(train_data=str(data), text_length=16, region_length=8, crop="pad")
    Checkpoints(run / "checkpoints", config, model, torch.optim.AdamW(model.parameters()), _Nothing()).save(1)
    return run


class _Nothing:
    """Stands for a loader: the checkpoint wants its place in the data."""

    def state_dict(self) -> dict[str, object]:
        return {}


def check(run: Path, data: Path) -> dict[str, tuple[float, float]]:
    """Compare all metrics of the command with those computed anew; returns the latter."""
    out = run / "eval.json"
    arguments = ("--checkpoint", run, "--data", data, "--batch-size", 16, "--device", "cpu", "--out", out)
    assert main(["eval", *map(str, arguments)]) == 0
    found = json.loads(out.read_text())["metrics"]
    seen = read_shards(data, run / "pictures")
    expected = recompute(cllip_fast.load(run, device="cpu"), seen, read_dataset_info(data).classes)
    assert found.pop("images") == len(seen)
    assert found.pop("regions") == sum(len(one.phrases) for one in seen)
    assert found.pop("skipped") == found.pop("regions_skipped") == 0
    assert set(found) == set(expected) == METRICS
    for name, (low, high) in expected.items():
        assert low - 1e-6 <= found[name] <= high + 1e-6, name
        assert high - low < 0.02, f"{name}: features too close to one another to test with"
    return expected


def test_generated(tmp_path: Path) -> None:
    """Several captions an image, captions and phrases that images share, phrases that are no class, empty images."""
    generator = torch.Generator().manual_seed(0)
    words = ["cat", "dog", "tall red tree", "bus", "lamp"]
    samples = []
    for number in range(60):
        width, height, captions, regions = (
            int(torch.randint(low, high, (), generator=generator))
            for low, high in ((40, 90), (40, 90), (1, 5), (0, 5))
        )  # fmt: skip
        cells = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8).numpy()
        data = _jpeg(Image.fromarray(cells).resize((width, height), Image.Resampling.NEAREST))
        corners = torch.rand(regions, 2, generator=generator) * torch.tensor([width, height]) * 0.6
        far = corners + (0.1 + 0.3 * torch.rand(regions, 2, generator=generator)) * torch.tensor([width, height])
        texts = [words[i] for i in torch.randint(0, 5, (regions,), generator=generator)]
        boxes = torch.cat([corners, far], 1).tolist()
        facts = record(
            width,
            height,
            captions=[f"picture {(number + i) % 50} of {words[i]}" for i in range(captions)],
            regions=[{"box": box, "text": text} for box, text in zip(boxes, texts, strict=True)],
        )
        samples.append((f"{number:03d}", data, facts))
    data = tmp_path / "data" / "val"
    write_shard(data, samples)
    train_bpe([*words, *(f"picture {i} of" for i in range(50))], 400).save(data.parent / "tokenizer.json")
    (data.parent / "dataset.json").write_text(json.dumps({"name": "noise", "classes": words[:3]}))
    expected = check(save_model(tmp_path / "run", data), data)
    assert 0 < expected["t2i_r10"][0] < 1
    assert 0 < expected["recognition_top1"][0] < 1


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


def test_coco(tmp_path: Path, coco: Path) -> None:
    """Photographs, five captions each, up to dozens of boxes of 80 classes, of which few images have many."""
    annotations = coco / "annotations"
    given = ("--instances", annotations / "instances.json", "--captions", annotations / "captions.json")
    arguments = ("convert", "coco", *given, "--images", coco / "images", "--out", tmp_path / "coco")
    assert main([*map(str, arguments), "--val-share", "0.15"]) == 0
    data = tmp_path / "coco" / "val"
    expected = check(save_model(tmp_path / "run", data), data)
    assert expected["pointing"][0] > 0


def test_referring_expressions(tmp_path: Path, coco: Path) -> None:
    given = ("--refs", coco / "annotations" / "refcocos.json", "--captions", coco / "annotations" / "captions.json")
    arguments = ("convert", "refcoco", *given, "--images", coco / "images", "--out", tmp_path / "ref")
    assert main([*map(str, arguments), "--val-share", "0"]) == 0
    data = tmp_path / "ref" / "train"
    info = json.loads((data.parent / "dataset.json").read_text())  # it has no classes: two of the phrases serve
    (data.parent / "dataset.json").write_text(json.dumps(info | {"classes": CLASSES}))
    expected = check(save_model(tmp_path / "run", data), data)
    records = json.loads((coco / "annotations" / "refcocos.json").read_text())
    assert sum(entry["solution"] is not None for entry in records) == 73
    assert expected["referring_iou"][0] > 0
