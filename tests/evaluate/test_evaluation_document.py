"""The commands of docs/evaluation.md run; several processes under torchrun evaluate as one."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cllip_fast.cli import main
from tests.launched import launch, output_of
from tests.saved_run import picture, save_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run, shards, class folders, masks and pairs, where the document has them."""
    save_run(tmp_path).rename(tmp_path / "runs" / "coco")
    (tmp_path / "shards").mkdir()
    (tmp_path / "data").rename(tmp_path / "shards" / "coco")
    (tmp_path / "shards" / "coco" / "train").rename(tmp_path / "shards" / "coco" / "val")
    shutil.copy(tmp_path / "shards" / "coco" / "tokenizer.json", tmp_path / "runs" / "coco")
    for place in ("photos/cat/1.jpg", "photos/dog/1.jpg", "images/1.jpg", "val2017/1.jpg"):
        (tmp_path / place).parent.mkdir(parents=True)
        picture(40, 30, len(place)).save(tmp_path / place)
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.eye(30, 40, dtype=np.uint8)).save(tmp_path / "masks" / "1.png")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    for name in ("add_att", "swap_obj"):
        pair = {"filename": "1.jpg", "caption": "a cat", "negative_caption": "a dog"}
        (tmp_path / f"{name}.json").write_text(json.dumps({"0": pair}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_run_and_two_processes_are_one(folder: Path) -> None:
    block = re.search(r"```bash\n(.*?)```", (ROOT / "docs" / "evaluation.md").read_text(), re.DOTALL)[1]
    *alone, together = block.strip().splitlines()
    for command in alone:
        assert main(shlex.split(command)[1:] + ["--device", "cpu"]) == 0, command
    tasks = ("shards", "classification", "segmentation", "compositional")
    assert sorted(path.name for path in Path("runs/coco").glob("eval_*")) == sorted(f"eval_{t}.json" for t in tasks)

    torchrun = [sys.executable, "-m", "torch.distributed.run", *shlex.split(together)[1:], "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = launch(torchrun, env=environment)
    output = output_of(process)
    assert process.returncode == 0, output[-3000:]
    assert output.count("wrote two.json") == 1
    one, two = (json.loads(Path(name).read_text())["metrics"] for name in ("runs/coco/eval_shards.json", "two.json"))
    assert two == pytest.approx(one, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data nowhere", "nowhere does not exist"),
        ("--data bare", "expected a data set folder, or class names by --names"),
        ("--data shards/coco/val --names twice.txt", "twice.txt holds 'cat' twice"),
        ("--task compositional --data add_att.json --images nowhere", "images folder nowhere does not exist"),
        ("--task compositional --data add_att.json --images masks", "none of the images can be used"),
        ("--task segmentation --images images --masks small --names names.txt", "none of the images can be used"),
    ],
)
def test_bad_input_is_named(folder: Path, arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("shards/coco/val", "bare")
    Path("twice.txt").write_text("cat\ndog\ncat\n")
    Path("small").mkdir()
    Image.fromarray(np.eye(3, dtype=np.uint8)).save("small/1.png")
    assert main(["eval", "--checkpoint", "runs/coco", "--device", "cpu", *arguments.split()]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_normalisation_is_that_of_the_configuration(tmp_path: Path) -> None:
    """OpenCLIP's ViT-L-14 of laion2b_s32b_b82k has a mean and deviation of 0.5; other ways to resize are refused."""
    from cllip_fast.data.loader import CLIP_MEAN
    from cllip_fast.errors import InputError
    from cllip_fast.interchange.preprocessing import read_preprocessing

    weights = tmp_path / "open_clip_model.safetensors"
    weights.touch()
    assert read_preprocessing(weights).mean == CLIP_MEAN
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "resample": 3}))
    assert read_preprocessing(tmp_path).mean == (0.5, 0.5, 0.5)
    config = tmp_path / "open_clip_config.json"
    config.write_text(json.dumps({"preprocess_cfg": {"mean": [0.4] * 3, "std": [0.3] * 3, "resize_mode": "shortest"}}))
    assert read_preprocessing(tmp_path) == ((0.4, 0.4, 0.4), (0.3, 0.3, 0.3))
    for wrong, message in (({"resize_mode": "squash"}, "has resize_mode 'squash'"), ({"mean": [1]}, "three numbers")):
        config.write_text(json.dumps({"preprocess_cfg": wrong}))
        with pytest.raises(InputError, match=message):
            read_preprocessing(tmp_path)


def test_pixels_follow_the_normalisation() -> None:
    from cllip_fast.inference import TrainedModel
    from cllip_fast.interchange.preprocessing import Preprocessing
    from tests.saved_run import small_model

    half = Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    model = TrainedModel(small_model(300), None, crop="center", text_length=16, region_length=8, preprocessing=half)
    pixels = model.preprocess(Image.new("RGB", (32, 32), (0, 255, 51)))
    assert [float(channel.mean()) for channel in pixels] == pytest.approx([-1, 1, -0.6], abs=1e-5)


def test_ambiguous_weights_say_which_model_to_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a configuration the activation is not known, which two presets differ in."""
    from dataclasses import replace

    from cllip_fast.interchange import export
    from cllip_fast.models import PRESETS, create_model

    sizes = {"embed_dim": 12, "vision_width": 16, "vision_depth": 1, "vision_heads": 2, "text_width": 8,
             "text_depth": 1, "text_heads": 2}  # fmt: skip
    clip = create_model("ViT-B-32", image_size=64, region="roi_align", **sizes)
    monkeypatch.setitem(PRESETS, "small", replace(clip.config, name="small"))
    monkeypatch.setitem(PRESETS, "small-quickgelu", replace(clip.config, name="small-quickgelu", quick_gelu=True))
    export(clip, Path("clip"), "openclip")
    Path("clip/open_clip_config.json").unlink()
    given = ["eval", "--checkpoint", "clip", "--device", "cpu", "--data", "shards/coco/val", "--batch-size", "2"]
    assert main(given) == 2
    message = "could be small or small-quickgelu, as there is no configuration beside it: name it with --model"
    assert message in capsys.readouterr().err
    assert main([*given, "--model", "small-quickgelu"]) == 0
