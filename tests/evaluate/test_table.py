from __future__ import annotations

import pytest

from cllip_fast.errors import InputError
from cllip_fast.evaluate import table


def test_table_lines_up_and_reads_as_markdown() -> None:
    text = table(
        {
            "val": {"images": 500.0, "i2t_r1": 0.98765, "recognition_colour": 1.0, "grounding_iou": None},
            "unseen": {"images": 60.0, "i2t_r1": 0.5, "recognition_colour": 0.0},
        },
        title="after 20 steps",
    )
    assert text.splitlines() == [
        "| after 20 steps, %   |   val | unseen |",
        "| ------------------- | ----: | -----: |",
        "| images              |   500 |     60 |",
        "| image → text R@1    |  98.8 |   50.0 |",
        "| – colour            | 100.0 |    0.0 |",
        "| grounding, mean IoU |     – |      – |",
    ]


def test_no_splits() -> None:
    with pytest.raises(InputError, match="splits is empty"):
        table({})
