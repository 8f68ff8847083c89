"""What the documents show runs as it stands: the README's example, the guides, the notebook."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from tests.saved_run import picture, save_run

ROOT = Path(__file__).parents[1]


def run_examples(path: Path, names: dict[str, object]) -> dict[str, object]:
    """Run the Python blocks of a document, one after the other, in one namespace."""
    examples = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    assert examples, f"{path} has no examples"
    for example in examples:
        exec(compile(example, str(path), "exec"), names)
    return names


def test_the_readme_example_has_gradients() -> None:
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
    run_examples(ROOT / "README.md", names)["loss"].backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)


def test_using_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_run(tmp_path).rename(tmp_path / "runs" / "scenes")
    picture(320, 240, seed=1).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names = run_examples(ROOT / "docs" / "use.md", {})
    assert names["maps"].shape == (1, 240, 320)
    assert [len(names["first"]), len(names["second"])] == [2, 1]
    assert names["prefix"].shape == (2, 16, 4096)
    names["prefix"].sum().backward()
    assert names["total"].isfinite()


def test_adding_a_loss() -> None:
    names = run_examples(ROOT / "docs" / "adding_a_loss.md", {})
    assert names["ours"].item() == pytest.approx(names["theirs"].item())


def test_the_tour(tmp_path: Path) -> None:
    """The notebook's cells in their order, with few steps, in a process of their own: it trains and sets signals."""
    cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text())["cells"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    script = tmp_path / "tour.py"
    script.write_text(code)
    environment = os.environ | {"CLLIP_TOUR_STEPS": "4", "MPLBACKEND": "agg"}
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "found.png").stat().st_size > 1000
