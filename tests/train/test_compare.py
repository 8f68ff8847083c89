"""The comparison's table, worked by hand."""

from __future__ import annotations

from cllip_fast.train.compare import markdown


def record(top1: float, iou: float | None) -> dict:
    return {
        "step": 7,
        "seconds": 10.0,
        "results": {"val": {"images": 3, "recognition_top1": top1, "grounding_iou": iou}},
    }


def test_mean_and_spread_of_each_run() -> None:
    runs = {"all": [record(0.5, 0.2), record(0.7, 0.4)], "clip": [record(0.1, None), record(0.1, None)]}
    lines = markdown(runs, [0, 1], {"all": "main.py", "clip": "main.py --losses clip"}).splitlines()
    assert lines[0].startswith("Seeds 0, 1;")
    assert "| region recognition, top-1 | 60.0 ± 14.1 | 10.0 ± 0.0 |" in lines
    assert "| grounding, mean IoU | 30.0 ± 14.1 | – |" in lines
    assert not any(line.startswith("| images") for line in lines)


def test_the_page_says_how_little_few_images_show() -> None:
    lines = markdown({"all": [record(0.5, 0.2)]}, [0], {"all": "main.py"}).splitlines()
    (said,) = [line for line in lines if line.startswith("* `val`")]
    assert said.startswith("* `val`: 3 images, 0 regions. Chance retrieves 33 % at R@1.")
    assert "up to 28.9 points" in said  # 100 √(½ · ½ / 3)
