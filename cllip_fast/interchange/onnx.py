"""Image and text encoder as ONNX files with a free batch size, checked with onnxruntime where it is installed."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from cllip_fast.errors import InputError
from cllip_fast.models import CllipModel

_CHECKED_BATCHES = (1, 3)  # beside the 2 that it is traced with
_TOLERANCE = 1e-4  # of features of unit length


class _Encoder(nn.Module):
    """One tower as a module of its own, whose features have unit length."""

    def __init__(self, tower: nn.Module, encode: Callable[..., Tensor]) -> None:
        super().__init__()
        self.tower, self.encode = tower, encode

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x, normalize=True)


def export_onnx(model: CllipModel, folder: Path) -> str:
    """Write `folder/image.onnx` (images [B, 3, S, S]) and `folder/text.onnx` (text [B, L] int64), both to [B, E].

    Features have unit length; logits are `exp(logit_scale)` times their products. fp32.

    Raises:
        InputError: `onnx` or `onnxscript` is absent, or onnxruntime computes something else than the model.
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"--to onnx needs {package}, which is not installed: pip install 'cllip-fast[onnx]'")
    config = model.config
    size = config.image_size

    def texts(batch: int) -> Tensor:
        return torch.randint(1, config.vocab_size, (batch, config.text_length))

    def images(batch: int) -> Tensor:
        return torch.randn(batch, 3, size, size)

    folder.mkdir(parents=True, exist_ok=True)
    model = copy.deepcopy(model).cpu().float().eval()
    checked = importlib.util.find_spec("onnxruntime") is not None
    encoders = (("image", model.encode_image, images), ("text", model.encode_text, texts))
    for name, encode, inputs in encoders:
        encoder, path = _Encoder(model, encode), folder / f"{name}.onnx"
        argument = "images" if name == "image" else "text"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's, about itself
            torch.onnx.export(
                encoder,
                (inputs(2),),
                path,
                input_names=[argument],
                output_names=["features"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
                external_data=False,
            )
        _check_free_batch(path)
        if checked:
            for batch in _CHECKED_BATCHES:
                _check(path, encoder, inputs(batch))
    verdict = "checked with onnxruntime" if checked else "not checked: onnxruntime is not installed"
    scale = model.logit_scale.exp().item()
    return f"wrote {folder / 'image.onnx'} and text.onnx ({verdict}); logit scale {scale:.6g}; the Prompter left out"


def _check_free_batch(path: Path) -> None:
    """The exporter fixes, without a word, a size that it cannot keep free."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    for value in (*graph.input, *graph.output):
        if not value.type.tensor_type.shape.dim[0].dim_param:
            raise InputError(f"{path} has a fixed batch size of {value.type.tensor_type.shape.dim[0].dim_value}")


@torch.no_grad()
def _check(path: Path, encoder: nn.Module, example: Tensor) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (features,) = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    difference = (torch.from_numpy(features) - encoder(example)).abs().max().item()
    if not difference < _TOLERANCE:
        raise InputError(f"{path} differs from the model by {difference:.1e}, expected less than {_TOLERANCE:.0e}")
