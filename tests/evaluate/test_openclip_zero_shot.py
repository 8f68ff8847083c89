"""Zero-shot classification against OpenCLIP's own functions, and its preprocessing against Pillow's arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from cllip_fast.data import load_tokenizer
from cllip_fast.evaluate.classification import classification
from cllip_fast.evaluate.templates import class_features, read_templates
from cllip_fast.inference import TrainedModel
from cllip_fast.models import CllipModel, create_model
from tests.data.photos import photo
from tests.openclip_peer import openclip_file

NAMES = ["tench", "great white shark", "New York {brace}", "café au lait", "missile", "missile (again)", "T-shirt"]


@pytest.fixture(scope="module")
def clip() -> CllipModel:
    """CLIP's architecture and vocabulary, small, with random weights that spread the texts."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "vision_width": 32, "vision_depth": 1, "vision_heads": 2, "text_width": 32,
             "text_depth": 2, "text_heads": 2}  # fmt: skip
    model = create_model("ViT-B-32", image_size=64, region="roi_align", **sizes)
    with torch.no_grad():
        model.text.tokens.weight.mul_(20)
    return model.eval()


@pytest.fixture(scope="module")
def loaded(clip: CllipModel) -> TrainedModel:
    return TrainedModel(clip, load_tokenizer("clip"), crop="center", text_length=77, region_length=77)


class Peer:
    """What `build_zero_shot_classifier` asks of a model."""

    def __init__(self, model: CllipModel) -> None:
        self.model = model

    def encode_text(self, text: Tensor, normalize: bool) -> Tensor:
        features = self.model.encode_text(text)
        return features / features.norm(dim=-1, keepdim=True) if normalize else features


@pytest.mark.parametrize("templates", ["openai", "photo"])
def test_class_features_are_openclips(clip: CllipModel, loaded: TrainedModel, templates: str) -> None:
    theirs = openclip_file("open_clip/zero_shot_metadata.py").OPENAI_IMAGENET_TEMPLATES
    expected = openclip_file("open_clip/zero_shot_classifier.py").build_zero_shot_classifier(
        Peer(clip),
        openclip_file("open_clip/tokenizer.py").SimpleTokenizer(),
        NAMES,
        theirs if templates == "openai" else [lambda name: f"a photo of a {name}."],
        num_classes_per_batch=3,
    )
    features = class_features(loaded, NAMES, read_templates(templates))
    torch.testing.assert_close(features, expected.T, rtol=0, atol=1e-6)
    assert (features @ features.T).fill_diagonal_(0).max() < 0.999, "classes differ"


def test_accuracy_is_openclips(clip: CllipModel, loaded: TrainedModel) -> None:
    peer = openclip_file("open_clip_train/zero_shot.py", absent=("open_clip", "open_clip_train.precision"))
    peer.float = lambda one: one.item()  # NumPy 2.4 makes no number of an array of one any more
    generator = torch.Generator().manual_seed(1)
    classes = normalize(torch.randn(40, 32, generator=generator), dim=1)
    batches = [(3 * torch.randn(n, 3, 64, 64, generator=generator), torch.randint(40, (n,), generator=generator))
               for n in (30, 17)]  # fmt: skip
    top1 = top5 = 0.0
    for pixels, labels in batches:
        with torch.no_grad():
            scores = 100 * normalize(clip.encode_image(pixels), dim=1) @ classes.T
        labels[::3] = scores.argsort(1)[::3, -1]  # random labels alone are hardly ever right
        labels[1::3] = scores.argsort(1)[1::3, -4]
        one, five = peer.accuracy(scores, labels, topk=(1, 5))
        top1, top5 = top1 + one, top5 + five
    found = classification(loaded, batches, classes)
    assert found["top1"] == pytest.approx(top1 / 47)
    assert found["top5"] == pytest.approx(top5 / 47)
    assert 0.2 < found["top1"] < found["top5"] < 1


def openclips_pixels(image: Image.Image, side: int) -> np.ndarray:
    """uint8 [side, side, 3]: the shorter side resized to `side` (bicubic), then the centre, as torchvision cuts it."""
    width, height = image.size
    short = min(width, height)
    size = tuple(side if length == short else int(side * length / short) for length in (width, height))
    left, top = (round((length - side) / 2) for length in size)
    resized = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + side, top + side)))


def differences(files: list[Path], side: int) -> np.ndarray:
    """Of all pixels, in levels of 255."""
    model = create_model("ViT-B-32", image_size=side, region="roi_align", vision_depth=1, text_depth=1)
    loaded = TrainedModel(model, load_tokenizer("clip"), crop="center", text_length=77, region_length=77)
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    found = []
    for file in files:
        pixels = loaded.preprocess(file).numpy().transpose(1, 2, 0) * std + mean
        with Image.open(file) as image:
            found.append(np.abs(255 * pixels - openclips_pixels(image, side)))
    return np.stack(found)


@pytest.mark.parametrize("side", [64, 224])
def test_center_is_openclips_preprocessing(tmp_path: Path, side: int) -> None:
    """Wide, tall, odd, square and long pictures. The window's edges lie on whole pixels of the picture, OpenCLIP's
    where they fall: at most half a pixel of the picture, as it is stored, lies between them."""
    sizes = [(640, 427), (333, 500), (481, 480), (224, 224), (900, 300)]
    for seed, (width, height) in enumerate(sizes):
        file = tmp_path / f"{seed}.jpg"
        Image.fromarray(photo(width, height, seed)).save(file, quality=95)
        found = differences([file], side)
        assert found.mean() < 2
        assert np.percentile(found, 99) < 10
        if width == height:
            assert found.max() < 2


def test_center_on_photographs(coco: Path) -> None:
    found = differences(sorted((coco / "images").glob("*.jpg"))[::12], 224)
    assert found.mean() < 1.2
    assert found.mean((1, 2, 3)).max() < 3.5
    assert np.percentile(found, 99) < 15
