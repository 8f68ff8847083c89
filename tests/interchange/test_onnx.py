"""ONNX files compute what the model computes, for batches of any size."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cllip_fast.errors import InputError
from cllip_fast.interchange import export
from cllip_fast.models import create_model
from tests.interchange.peers import our_outputs, randomize, small_model

needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript or onnxruntime is not installed",
)


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("preset", ["ViT-B-32-quickgelu", "tiny"])
def test_onnxruntime_computes_the_same(preset: str, tmp_path: Path) -> None:
    import onnxruntime

    model = (
        create_model("tiny", image_size=32, vocab_size=50, text_length=9) if preset == "tiny" else small_model(preset)
    )
    if preset != "tiny":
        randomize(model)
    said = export(model, tmp_path, "onnx")
    assert "checked with onnxruntime" in said
    images = torch.randn(5, 3, model.config.image_size, model.config.image_size)
    text = torch.randint(1, 50, (5, 9)) * (torch.arange(9) < torch.tensor([[1], [3], [9], [4], [6]]))
    for name, encode, given in (("image", model.encode_image, images), ("text", model.encode_text, text)):
        session = onnxruntime.InferenceSession(tmp_path / f"{name}.onnx", providers=["CPUExecutionProvider"])
        (features,) = session.run(["features"], {"images" if name == "image" else "text": given.numpy()})
        torch.testing.assert_close(torch.from_numpy(features), encode(given, normalize=True), rtol=1e-4, atol=1e-5)
    assert our_outputs(model)["image"].requires_grad is False
    assert model.training  # exporting leaves the model as it was
    assert F.cosine_similarity(*torch.from_numpy(features)[:2, None]).item() < 0.999


def test_onnx_is_refused_without_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"--to onnx needs onnx, which is not installed: pip install 'cllip-fast\[onnx\]'"
    ):
        export(small_model(), tmp_path, "onnx")
