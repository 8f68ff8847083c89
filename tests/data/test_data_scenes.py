"""The generated data set: boxes exact, captions true, held-out combinations kept apart, the same bytes every time."""

import hashlib
import io
import itertools
import json
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from cllip_fast.data import drawing, make_scenes, read_dataset_info, scene, scenes
from cllip_fast.data.phrases import ALL_PHRASES, COLOURS, SHAPES, SIZES, TEXTURES, held_out_combinations
from cllip_fast.data.shards import list_members
from cllip_fast.errors import InputError

PHRASE = "(?:{}) (?:{}) (?:{}) (?:{})".format(*("|".join(v) for v in (SIZES, COLOURS, TEXTURES, SHAPES)))
RELATION = "left of|right of|above|below"
CAPTION = re.compile(
    rf"a ({PHRASE}) ({RELATION}) a ({PHRASE})"
    rf"(?: and ({RELATION}) a ({PHRASE})| and a ({PHRASE}) ({RELATION}) a ({PHRASE})"
    rf"| with a ({PHRASE})(?: and a ({PHRASE}))?(?: and a ({PHRASE}))?)?"
)


def some(split, count=150, seed=0, difficulty="normal"):
    return [scenes.make_scene(seed, split, index, difficulty) for index in range(count)]


def test_there_are_448_phrases_and_34_combinations_held_out():
    assert len(ALL_PHRASES) == len({str(phrase) for phrase in ALL_PHRASES}) == 448
    for seed in range(5):
        held_out = held_out_combinations(seed)
        assert len(held_out) == 34
        trained = set(itertools.product(COLOURS, TEXTURES, SHAPES)) - held_out
        for a, b in itertools.combinations(range(3), 2):
            assert len({(c[a], c[b]) for c in trained}) == len((COLOURS, TEXTURES, SHAPES)[a]) * len(
                (COLOURS, TEXTURES, SHAPES)[b]
            )
    assert held_out_combinations(0) != held_out_combinations(1)


def test_held_out_combinations_are_in_unseen_only():
    held_out = {" ".join(combination) for combination in held_out_combinations(0)}
    for split in scenes.SPLITS:
        texts = {region["text"].split(" ", 1)[1] for _, record, _ in some(split) for region in record["regions"]}
        assert texts <= held_out if split == "unseen" else not texts & held_out


@pytest.mark.parametrize("difficulty", scene.DIFFICULTIES)
def test_boxes_are_the_tight_boxes_of_the_drawn_pixels(difficulty):
    rng = np.random.default_rng(0)
    for _, record, objects in some("train", 60, difficulty=difficulty):
        for item, region in zip(objects, record["regions"], strict=True):
            # Redraw the object alone, pure white on black, and look for its pixels.
            image = np.zeros((64, 64, 3), dtype=np.int16)
            second = drawing.texture_pattern(item.phrase.texture, int(rng.integers(12)), (3, 4), item.mask.shape)
            drawing.paint(image, item.left, item.top, item.mask, second, np.full((2, 3), 255, dtype=np.int16))
            rows, columns = np.flatnonzero(image.any((1, 2))), np.flatnonzero(image.any((0, 2)))
            assert region["box"] == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            low, high = scene.DIFFICULTIES[difficulty].sides(item.phrase.size)
            assert low <= columns[-1] + 1 - columns[0] <= high
            assert low <= rows[-1] + 1 - rows[0] <= high


def test_pixels_of_an_object_have_its_colour():
    for pixels, _, objects in some("val", 60):
        item = objects[-1]  # drawn last, so nothing hides it
        if item.phrase.texture == "solid":
            x0, y0, x1, y1 = item.box
            mean = pixels[y0:y1, x0:x1][item.mask].mean(0)
            assert np.abs(mean - drawing.COLOUR_RGB[item.phrase.colour]).max() < 24


def test_scenes_hold_two_to_five_objects_each_mostly_visible():
    drawn = [objects for _, _, objects in some("train", 300)]
    counts = Counter(len(objects) for objects in drawn)
    assert set(counts) == {2, 3, 4, 5}
    assert min(counts.values()) > 40
    shares = [share for objects in drawn for share in scene.visible_shares(objects)]
    assert min(shares) >= scene.MIN_VISIBLE
    assert min(shares) < 1, "some objects do overlap"
    for objects in drawn:
        phrases = [item.phrase for item in objects]
        assert len(set(phrases)) == len(phrases)


def test_hard_scenes_are_fuller_and_their_captions_leave_some_out():
    hard = some("train", 200, difficulty="hard")
    assert {len(objects) for _, _, objects in hard} == {3, 4, 5, 6}
    for _, record, objects in hard:
        names = [str(item.phrase) for item in objects]
        for caption in record["captions"]:
            assert len(caption.split()) <= 30
            assert sum(name in caption for name in names) == min(len(objects), 4)
    small, large = (scene.DIFFICULTIES["hard"].sides(size) for size in SIZES)
    # What the best guess from an object's sides gets right: not everything, but most.
    area = lambda width, height, side: (  # noqa: E731
        all(side[0] <= x <= side[1] for x in (width, height)) / (side[1] - side[0] + 1) ** 2
    )
    best = sum(max(area(w, h, small), area(w, h, large)) for w, h in itertools.product(range(64), repeat=2)) / 2
    assert best == pytest.approx(0.955)
    # Every shape fills its box at all these sides.
    for side in (small, large):
        for shape, width, height in itertools.product(SHAPES, *2 * [range(side[0], side[1] + 1)]):
            mask = drawing.shape_mask(shape, width, height)
            assert mask[0].any()
            assert mask[-1].any()
            assert mask[:, 0].any()
            assert mask[:, -1].any()


def test_visible_shares_count_hidden_pixels():
    square = np.ones((10, 10), dtype=bool)
    below = scene.SceneObject(ALL_PHRASES[0], 0, 0, square)
    above = scene.SceneObject(ALL_PHRASES[1], 5, 8, square)
    assert scene.visible_shares([below, above]) == [0.9, 1.0]


def test_captions_are_true_of_the_boxes():
    seen = Counter()
    for _, record, objects in some("train", 300):
        centre = {str(item.phrase): item.centre for item in objects}
        for caption in record["captions"]:
            assert len(caption.split()) <= 30
            match = CAPTION.fullmatch(caption)
            assert match, caption
            a, ab, b, ac, c, d, de, e, f, g, h = match.groups()
            assert sorted(name for name in (a, b, c, d, e, f, g, h) if name) == sorted(centre)
            for first, relation, second in ((a, ab, b), (a, ac, c), (d, de, e)):
                if relation:
                    seen[relation] += 1
                    (x0, y0), (x1, y1) = centre[first], centre[second]
                    holds = {"left of": x0 < x1, "right of": x0 > x1, "above": y0 < y1, "below": y0 > y1}
                    assert holds[relation], caption
                    assert (abs(x1 - x0) >= abs(y1 - y0)) == (relation in ("left of", "right of"))
    assert set(seen) == {"left of", "right of", "above", "below"}


def digest(root):
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*.*"))}


def test_the_bytes_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "SHARD_SIZE", 8)
    one = make_scenes(tmp_path / "one", train=20, val=3, unseen=3, seed=5, processes=1)
    two = make_scenes(tmp_path / "two", train=20, val=3, unseen=3, seed=5, processes=2)
    assert digest(one) == digest(two)
    assert len(list((one / "train").iterdir())) == 3
    other = make_scenes(tmp_path / "other", train=20, val=3, unseen=3, seed=6, processes=1)
    assert digest(other)["train/000000.tar"] != digest(one)["train/000000.tar"]


def test_the_folder_describes_itself(scene_set):
    info = read_dataset_info(scene_set / "train")
    assert info == read_dataset_info(scene_set) == read_dataset_info(scene_set / "val" / "000000.tar")
    assert (info.name, len(info.classes), info.tokenizer_path) == ("scenes", 448, scene_set / "tokenizer.json")
    assert info.attributes["small red striped circle"] == {
        "size": "small",
        "colour": "red",
        "texture": "striped",
        "shape": "circle",
    }
    held_out = json.loads((scene_set / "dataset.json").read_text())["held_out"]
    assert sorted(" ".join(combination) for combination in held_out_combinations(0)) == held_out


def test_shards_hold_the_scenes_as_jpeg(scene_set):
    path = scene_set / "unseen" / "000000.tar"
    members = list_members(path)
    assert len(members) == 24
    data = path.read_bytes()
    jpeg, text = (data[m.offset : m.offset + m.size] for m in members[6:8])
    image = Image.open(io.BytesIO(jpeg))
    pixels, record, _ = scenes.make_scene(0, "unseen", 3)
    assert (image.format, image.size) == ("JPEG", (64, 64))
    assert np.abs(np.asarray(image).astype(int) - pixels).mean() < 12
    assert json.loads(text) == record


def test_a_finished_set_is_used_again_and_another_one_refused(scene_set):
    before = (scene_set / "train" / "000000.tar").stat().st_mtime_ns
    assert make_scenes(scene_set, train=40, val=10, unseen=12) == scene_set
    assert (scene_set / "train" / "000000.tar").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="holds another data set: its seed is 0, expected 1"):
        make_scenes(scene_set, train=40, val=10, unseen=12, seed=1)
    with pytest.raises(InputError, match='its name is "scenes", expected "scenes-hard"'):
        make_scenes(scene_set, train=40, val=10, unseen=12, difficulty="hard")
    with pytest.raises(InputError, match="its splits is"):
        make_scenes(scene_set, train=41, val=10, unseen=12)


def test_an_interrupted_generation_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    root = tmp_path / "set"
    with monkeypatch.context() as patch:
        patch.setattr(scenes, "_train_tokenizer", stop)
        with pytest.raises(KeyboardInterrupt):
            make_scenes(root, train=3, val=1, unseen=1, processes=1)
    assert not root.exists()
    (tmp_path / ".set.partial").mkdir()  # what a killed process leaves
    (tmp_path / ".set.partial" / "rest").write_text("rest")
    make_scenes(root, train=3, val=1, unseen=1, processes=1)
    assert sorted(p.name for p in root.iterdir()) == ["dataset.json", "tokenizer.json", "train", "unseen", "val"]


def test_bad_arguments_are_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is not empty"):
        make_scenes(tmp_path / "full", train=1, val=1, unseen=1)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"
    with pytest.raises(InputError, match="val is 0"):
        make_scenes(tmp_path / "x", val=0)
    with pytest.raises(InputError, match="seed is -1"):
        make_scenes(tmp_path / "x", seed=-1)
    with pytest.raises(InputError, match="processes is 0"):
        make_scenes(tmp_path / "x", processes=0)
    with pytest.raises(InputError, match=r"no dataset\.json"):
        read_dataset_info(tmp_path / "x")
    (tmp_path / "full" / "dataset.json").write_text('{"name": "x"}')
    with pytest.raises(InputError, match="lacks a text 'name' or a list"):
        read_dataset_info(tmp_path / "full")
