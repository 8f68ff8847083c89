"""A loaded run gives the evaluation's numbers, in pixels of the image as it was."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import cllip_fast
from cllip_fast.data import Loader, create_loader, load_tokenizer, train_bpe
from cllip_fast.data.crop import choose_window, map_box
from cllip_fast.errors import InputError
from cllip_fast.evaluate import evaluate
from cllip_fast.evaluate.features import collect
from cllip_fast.evaluate.regions import classify, recognition
from cllip_fast.evaluate.texts import TextBook
from cllip_fast.inference import TrainedModel, lay_over_image, to_pixels
from cllip_fast.losses.boxes import box_iou
from tests.saved_run import CLASSES, LENGTHS, SIZES, picture, regions, save_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def model(run: Path) -> TrainedModel:
    return cllip_fast.load(run, device="cpu")


def data(run: Path) -> Path:
    return run.parent.parent / "data"


def paths(run: Path) -> list[Path]:
    return [data(run) / f"{name}.jpg" for name in SIZES]


def boxes() -> list[list[list[float]]]:
    return [[region["box"] for region in regions(*size)] for size in SIZES.values()]


def evaluation_loader(run: Path, crop: str) -> Loader:
    return create_loader(
        data(run) / "train",
        tokenizer=load_tokenizer(data(run) / "tokenizer.json"),
        batch_size=3,
        image_size=32,
        max_regions=16,
        train=False,
        crop=crop,
        **LENGTHS,
    )


@pytest.mark.parametrize(("crop", "region"), [("pad", "prompter"), ("center", "prompter"), ("random", "roi_align")])
def test_the_numbers_are_those_of_the_evaluation(tmp_path: Path, crop: str, region: str) -> None:
    run = save_run(tmp_path, crop=crop, region=region)
    model = cllip_fast.load(run, device="cpu")
    loader = evaluation_loader(run, "pad" if crop == "random" else crop)
    tokenizer = load_tokenizer(data(run) / "tokenizer.json")
    captions = TextBook(model.model, tokenizer, LENGTHS["text_length"], CPU)
    phrases = TextBook(model.model, tokenizer, LENGTHS["region_length"], CPU)
    split = collect(model.model, loader, captions, phrases, device=CPU, progress=False)
    metrics = evaluate(model.model, loader, tokenizer=tokenizer, classes=CLASSES, progress=False, **LENGTHS)

    (batch,) = loader
    assert torch.equal(torch.stack([model.preprocess(path) for path in paths(run)]), batch.images)
    assert_close(model.encode_image(paths(run)), split.image_features)
    assert_close(model.encode_text(list(captions.numbers)), captions.features())
    found = model.encode_regions(paths(run), boxes())
    assert_close(found, split.region_features)
    classes = model.encode_phrases(CLASSES)
    assert_close(classes, phrases.features())
    labels = torch.arange(len(CLASSES)).repeat(len(SIZES))
    recognised = recognition(classify(found, classes), labels, CLASSES)
    assert recognised["recognition_top1"] == metrics["recognition_top1"]

    if region == "roi_align":
        assert metrics["grounding_iou"] is None
        with pytest.raises(InputError, match="grounding needs the Prompter"):
            model.ground(paths(run)[0], CLASSES)
        return
    iou = []
    for path, true, size in zip(paths(run), boxes(), SIZES.values(), strict=True):
        source = torch.tensor(choose_window(crop, *size, 32, seed=0, epoch=0, key="").source)
        seen = torch.tensor(true).clamp(source[[0, 1, 0, 1]], source[[2, 3, 2, 3]])
        iou.append(box_iou(model.ground(path, CLASSES), seen))
    assert_close(torch.cat(iou), split.iou, atol=1e-5, rtol=0)
    assert split.iou.std() > 0.02, "all alike would show nothing"
    assert metrics["grounding_iou"] == pytest.approx(float(torch.cat(iou).mean()), abs=1e-5)


@pytest.mark.parametrize("crop", ["pad", "center", "random"])
def test_boxes_come_back_to_where_they_were(crop: str) -> None:
    for width, height in ((640, 481), (17, 123), (4000, 31), (64, 64)):
        window = choose_window(crop, width, height, 224, seed=3, epoch=1, key=f"{width}")
        x0, y0, x1, y1 = window.source
        inside = (x0 + 0.25 * (x1 - x0), y0 + 0.1 * (y1 - y0), x0 + 0.8 * (x1 - x0), y1)
        share = torch.tensor(map_box(inside, window, 224, 0))
        assert_close(to_pixels(share[None], window, 224)[0], torch.tensor(inside), atol=1e-6 * width, rtol=1e-6)
        beyond = to_pixels(torch.tensor([-1.0, -1.0, 2.0, 2.0]), window, 224)
        assert beyond.tolist() == [x0, y0, x1, y1], "clipped to what the model sees"


@pytest.mark.parametrize(("crop", "size"), [("pad", (300, 100)), ("center", (100, 300)), ("random", (97, 130))])
def test_maps_lie_where_their_patches_do(crop: str, size: tuple[int, int]) -> None:
    side, patches = 64, 8
    window = choose_window(crop, *size, side, seed=0, epoch=0, key="k")
    (x0, y0, x1, y1), (left, top, right, bottom) = window
    centre = (torch.arange(patches) + 0.5) * (side / patches)
    maps = torch.stack([centre.expand(patches, -1), centre[:, None].expand(-1, patches)])  # each place's own x and y
    small = (size[0] // 2, size[1] // 3)
    laid = lay_over_image(maps, window, side, size, small)
    assert laid.shape == (2, small[1], small[0])
    for row in range(0, small[1], 3):
        for column in range(0, small[0], 5):
            x, y = (column + 0.5) * size[0] / small[0], (row + 0.5) * size[1] / small[1]
            if not (x0 < x < x1 and y0 < y < y1):
                assert laid[:, row, column].isnan().all()
                continue
            place = torch.tensor(
                [left + (x - x0) * (right - left) / (x1 - x0), top + (y - y0) * (bottom - top) / (y1 - y0)]
            )
            assert_close(laid[:, row, column], place.clamp(4, side - 4), atol=1e-3, rtol=0)


def test_the_similarity_map_is_the_cosine_of_phrase_and_patch(run: Path, model: TrainedModel) -> None:
    path = paths(run)[0]
    maps = model.similarity_map(path, CLASSES)
    tokens = model.model.image_tokens(model.preprocess(path)[None])
    patches = model.model.encode_patches(tokens, normalize=True)[0].unflatten(0, (4, 4))
    assert_close(maps[2, 1, 3], model.encode_phrases(CLASSES[2])[0] @ patches[1, 3])
    laid = model.similarity_map(path, CLASSES, size=SIZES["wide"])
    assert laid.shape == (4, 220, 300)
    assert not laid.isnan().any()


def test_all_kinds_of_images_give_the_same(run: Path, model: TrainedModel, tmp_path: Path) -> None:
    image = picture(50, 40, seed=7)
    image.save(tmp_path / "image.png")
    image.save(tmp_path / "image.bmp")
    pixels = np.asarray(image)
    kinds = [tmp_path / "image.png", str(tmp_path / "image.bmp"), image, pixels, image.convert("RGBA")]
    features = model.encode_image(kinds)
    assert features.shape == (5, 16)
    assert_close(features.norm(dim=1), torch.ones(5))
    assert (features == features[:1]).all()
    assert_close(model.encode_image(np.stack([pixels, pixels])), features[:2])
    grey = image.convert("L")
    assert_close(model.encode_image(np.asarray(grey)), model.encode_image([grey]))


@pytest.mark.parametrize("orientation", range(2, 9))
def test_photos_are_seen_as_people_see_them(model: TrainedModel, tmp_path: Path, orientation: int) -> None:
    upright, exif = picture(50, 40, seed=7), Image.Exif()
    to_stored = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
                 7: "TRANSVERSE", 8: "ROTATE_270"}  # fmt: skip
    stored = upright.transpose(Image.Transpose[to_stored[orientation]])
    exif[0x0112] = orientation
    for suffix in ("png", "webp"):
        stored.save(tmp_path / f"photo.{suffix}", exif=exif, lossless=True)
    box = [[30, 10, 48, 38]]
    assert torch.equal(model.preprocess(tmp_path / "photo.png"), model.preprocess(upright))
    assert torch.equal(model.preprocess(tmp_path / "photo.webp"), model.preprocess(upright))
    assert torch.equal(model.encode_regions(tmp_path / "photo.png", box), model.encode_regions(upright, box))
    assert torch.equal(model.ground(tmp_path / "photo.png", CLASSES), model.ground(upright, CLASSES))


def test_what_was_not_trained_is_not_answered(tmp_path: Path) -> None:
    model = cllip_fast.load(save_run(tmp_path, losses="clip,grounding"), device="cpu")
    assert model.grounds
    assert model.ground(paths(tmp_path / "runs" / "tiny")[0], "red").shape == (1, 4)
    with pytest.raises(InputError, match="losses are clip, grounding, expected region among them"):
        model.encode_regions(paths(tmp_path / "runs" / "tiny")[0], [[0, 0, 9, 9]])
    model = cllip_fast.load(save_run(tmp_path, losses="clip,region"), device="cpu")
    with pytest.raises(InputError, match="losses are clip, region, expected grounding among them"):
        model.ground(paths(tmp_path / "runs" / "tiny")[0], "red")
    model = cllip_fast.load(save_run(tmp_path, losses="clip", region="roi_align"), device="cpu")
    assert model.encode_regions(paths(tmp_path / "runs" / "tiny")[0], [[0, 0, 9, 9]]).shape == (1, 16)


def test_boxes_of_half_types_and_pixels_of_double_are_numbers(run: Path, model: TrainedModel) -> None:
    image, box = paths(run)[0], torch.tensor([[8.0, 16, 64, 96]])
    assert torch.equal(model.encode_regions(image, box.bfloat16()), model.encode_regions(image, box))
    pixels = model.preprocess(image)[None]
    assert torch.equal(model.encode_pixels(pixels.double()), model.encode_pixels(pixels))


def test_batches_and_images_without_boxes_change_nothing(run: Path, model: TrainedModel) -> None:
    one_by_one = cllip_fast.load(run, device="cpu", batch_size=1)
    ragged = [boxes()[0], [], torch.tensor(boxes()[2][:1])]
    features = model.encode_regions(paths(run), ragged)
    assert_close(one_by_one.encode_regions(paths(run), ragged), features)
    assert_close(model.encode_regions(paths(run)[2], boxes()[2][:1]), features[-1:])
    assert model.encode_regions(paths(run)[1], []).shape == (0, 16)
    assert not features.requires_grad
    assert not features.is_inference(), "a head can be trained on them"
    assert not model.model.training


def test_reduced_precision_computes_under_autocast(run: Path, model: TrainedModel) -> None:
    reduced = cllip_fast.load(run, device="cpu", dtype=torch.bfloat16)
    features = reduced.encode_image(paths(run))
    assert features.dtype == torch.float32
    assert 0 < (features - model.encode_image(paths(run))).abs().max() < 0.05


def test_a_huge_and_a_damaged_file_end_in_one_line(
    model: TrainedModel, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    huge, cut = tmp_path / "huge.png", tmp_path / "cut.jpg"
    Image.new("1", (9500, 9500)).save(huge)
    picture(60, 50, seed=0).save(cut)
    cut.write_bytes(cut.read_bytes()[:-400])
    with pytest.raises(InputError, match=r"huge\.png' cannot be used \(too many pixels\): 9500×9500, expected at most"):
        model.encode_image(huge)
    with pytest.raises(InputError, match=r"cut\.jpg' cannot be used \(broken image\): "):
        model.encode_image(cut)
    assert not recwarn, "of Pillow, beside the line"


def test_a_run_is_its_newest_checkpoint(tmp_path: Path) -> None:
    run = save_run(tmp_path, steps=(9, 10))
    first, last = (run / "checkpoints" / f"step_{step:08d}.pt" for step in (9, 10))
    newest = cllip_fast.load(run, device="cpu").encode_text("red circle")
    assert torch.equal(newest, cllip_fast.load(last, device="cpu").encode_text("red circle"))
    assert not torch.equal(newest, cllip_fast.load(first, device="cpu").encode_text("red circle"))

    tokenizer = (data(run) / "tokenizer.json").rename(tmp_path / "moved.json")
    with pytest.raises(InputError, match="name it with tokenizer: none lies beside"):
        cllip_fast.load(run)
    assert torch.equal(newest, cllip_fast.load(run, device="cpu", tokenizer=tokenizer).encode_text("red circle"))
    tokenizer.rename(run / "tokenizer.json")
    assert torch.equal(newest, cllip_fast.load(run, device="cpu").encode_text("red circle"))
    train_bpe(["other words"], 260).save(run / "tokenizer.json")
    with pytest.raises(InputError, match="has 260 ids, expected 280"):
        cllip_fast.load(run)


BAD_USES: dict[str, tuple[Callable[[TrainedModel, Image.Image], object], str]] = {
    "missing file": (
        lambda m, i: m.encode_image("nowhere.jpg"),
        "image 'nowhere.jpg' cannot be read: No such file .*expected an image",
    ),
    "no image": (lambda m, i: m.encode_image(__file__), r"test_inference.py' cannot be read: it is no image"),
    "no path": (lambda m, i: m.encode_image("a\0b"), "cannot be read: embedded null byte"),
    "bytes": (lambda m, i: m.encode_image(b"abc"), "the image is of type bytes"),
    "32 bits": (lambda m, i: m.encode_image(i.convert("F")), "the image has mode 'F', expected 8 or 16 bits"),
    "pixels' size": (lambda m, i: m.encode_pixels(torch.zeros(1, 3, 8, 8)), r"pixels has shape \[1, 3, 8, 8\]"),
    "pixels' type": (lambda m, i: m.encode_pixels(np.zeros((1, 3, 32, 32))), "pixels must be a tensor"),
    "float array": (lambda m, i: m.encode_image(np.zeros((4, 4, 3))), r"float64 \[4, 4, 3\], expected uint8"),
    "channels first": (lambda m, i: m.preprocess(np.zeros((3, 8, 8), np.uint8)), r"uint8 \[3, 8, 8\], expected"),
    "a tensor": (lambda m, i: m.preprocess(torch.zeros(3, 8, 8)), "the image is of type Tensor"),
    "a number": (lambda m, i: m.encode_image(5), "the image is of type int"),
    "no images": (lambda m, i: m.encode_image([]), "images is empty"),
    "no texts": (lambda m, i: m.encode_text([]), "texts is empty"),
    "no string": (lambda m, i: m.ground(i, ["a", 3]), "holds 3 of type int"),
    "no text": (lambda m, i: m.encode_text(None), "texts is None of type NoneType"),
    "features": (lambda m, i: m.ground(i, torch.ones(2, 16)), r"phrases is \[2, 16\] of type Tensor, expected strings"),
    "rows": (lambda m, i: m.encode_text(np.ones((2, 16))), r"texts holds \[16\] of type ndarray, expected strings"),
    "nested": (lambda m, i: m.encode_text([["a"]]), "holds .* of type list"),
    "no UTF-8": (lambda m, i: m.encode_text(["\udcff"]), "expected what can be written as UTF-8"),
    "blank": (lambda m, i: m.ground(i, ["a", " \n"]), "phrase 1 is .*, expected words"),
    "map of features": (
        lambda m, i: m.similarity_map(i, torch.zeros(2, 7)),
        r"phrases has shape \[2, 7\], expected \[K, 16\]",
    ),
    "map of nothing": (lambda m, i: m.similarity_map(i, "a", size=(0, 5)), r"size is \(0, 5\), expected width and"),
    "map of a number": (lambda m, i: m.similarity_map(i, "a", size=5), "size is 5, expected width and height"),
    "no boxes": (lambda m, i: m.encode_regions([i, i], None), "boxes are of type NoneType"),
    "shares": (lambda m, i: m.encode_regions(i, [[0, 0, 1, 1]]), "expected pixels, not shares of the image"),
    "one box too few": (lambda m, i: m.encode_regions([i, i], [[]]), "boxes are for 1 images, expected 2"),
    "shape": (lambda m, i: m.encode_regions(i, [1, 2, 3, 4]), r"image 0 have shape \[4\], expected \[M, 4\]"),
    "ragged": (lambda m, i: m.encode_regions(i, [[1, 2, 3], [4]]), "boxes of image 0 are not numbers"),
    "empty box": (
        lambda m, i: m.encode_regions([i, i], [[], [[5, 5, 5, 9]]]),
        "box 0 of image 1 is .*expected finite x0 < x1",
    ),
    "not finite": (lambda m, i: m.encode_regions(i, [[0, 0, float("inf"), 9]]), "box 0 of image 0 is"),
    "outside": (lambda m, i: m.encode_regions(i, [[30, 0, 40, 9]]), "lies outside what the model sees .*x 0 to 20"),
}


@pytest.mark.parametrize("name", BAD_USES)
def test_bad_input_is_named(model: TrainedModel, name: str) -> None:
    use, message = BAD_USES[name]
    with pytest.raises(InputError, match=message):
        use(model, picture(20, 10, seed=0))


def test_bad_options_are_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected the folder of a run or a checkpoint"):
        cllip_fast.load(tmp_path)
    with pytest.raises(InputError, match=r"nowhere\.pt does not exist, expected a run's folder"):
        cllip_fast.load(tmp_path / "nowhere.pt")
    for option, message in (
        ({"device": "abacus"}, "device is 'abacus'"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
        ({"attention": "none"}, "attention is 'none'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": "3"}, "batch_size is '3'"),
        ({"tokenizer": "nowhere.json"}, "nowhere.json does not exist"),
        ({"tokenizer": 5}, "tokenizer is 5 of type int, expected a path"),
        ({"path": None}, "path is None of type NoneType, expected a path"),
    ):
        with pytest.raises(InputError, match=message):
            cllip_fast.load(**{"path": run} | option)


def test_importing_the_package_imports_no_torch() -> None:
    subprocess.run([sys.executable, "-c", "import sys, cllip_fast; assert 'torch' not in sys.modules"], check=True)
