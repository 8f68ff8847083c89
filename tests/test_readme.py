"""The README's example runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch.nn.functional import normalize


def test_the_drop_in_example_runs_and_has_gradients() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)

    def features(*shape: int) -> torch.Tensor:
        return normalize(torch.randn(*shape), dim=-1).requires_grad_()

    names = {
        "image_features": features(6, 8),
        "text_features": features(6, 8),
        "region_features": features(6, 3, 8),
        "region_text_features": features(6, 3, 8),
        "patch_features": features(6, 9, 8),
        "logit_scale": torch.tensor(10.0, requires_grad=True),
        "mask": torch.rand(6, 3) > 0.3,
    }
    leaves = [value for value in names.values() if value.requires_grad]
    exec(example, names)
    names["loss"].backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)
