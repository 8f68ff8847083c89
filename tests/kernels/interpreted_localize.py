"""The Triton kernels of localization against the dense fp64 loss, in Triton's interpreter or on a GPU.

TRITON_INTERPRET=1 python -m tests.kernels.interpreted_localize      # what test_triton_localize.py runs
"""

from __future__ import annotations

import torch

from cllip_fast.kernels.localize import triton as kernels
from cllip_fast.kernels.localize.boxes import patch_spans
from cllip_fast.streaming.localization import localization
from tests import dense, dense_local

# images, grid, texts of an image, D: below and beyond one tile of patches, of an image's texts, of all texts.
SHAPES = [
    (1, (1, 1), 1, 1),
    (2, (3, 41), 17, 17),
    (3, (11, 13), 3, 64),
    (17, (2, 3), 9, 123),
]


def check(
    shape: tuple[int, tuple[int, int], int, int],
    dtype: torch.dtype,
    scale: float,
    other_images: bool,
    device: str = "cpu",
    length: float = 1.0,
) -> None:
    """Value and gradients; `length` of the features."""
    images, grid, texts, width = shape
    patches = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(1)
    boxes = torch.rand(images, texts, 2, 2, generator=generator).sort(2).values.flatten(2)
    boxes[0, 0] = torch.tensor([0.0, 0, 1, 1])
    boxes[-1, -1, 2:] = boxes[-1, -1, :2] + 1e-3
    mask = torch.rand(images, texts, generator=generator) < 0.7
    mask[0, 0] = True
    ids = torch.randint(0, 1 + images * texts // 2, (images, texts), generator=generator) if other_images else None
    features = (
        length * dense.features(images * patches, width, dtype, 3)[0].view(images, patches, width),
        length * dense.features(images * texts, width, dtype, 4)[0].view(images, texts, width),
        torch.tensor(scale, dtype=dtype),
    )
    boxes, mask, *features = (each.to(device) for each in (boxes, mask, *features))
    ids = ids if ids is None else ids.to(device)
    spans = patch_spans(boxes, grid)

    def ours(patches: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        options = {"grid": grid, "valid": mask, "ids": ids, "other_images": other_images, "backend": "triton"}
        return localization(patches, texts, scale, spans, **options)

    def reference(patches: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return dense_local.localization(patches, texts, boxes, scale, mask, grid, other_images=other_images, ids=ids)

    dense.assert_as_good_as_dense(ours, reference, features)


def check_without_texts() -> None:
    """Nothing is launched for a batch without images, or without texts."""
    for images, texts in ((0, 2), (3, 0)):
        for other_images in (False, True):
            loss = localization(
                torch.zeros(images, 4, 8, requires_grad=True),
                torch.zeros(images, texts, 8),
                torch.tensor(2.0),
                torch.zeros(images, texts, 4, dtype=torch.int32),
                grid=(2, 2),
                valid=torch.ones(images, texts, dtype=torch.bool),
                other_images=other_images,
                backend="triton",
            )
            loss.backward()
            assert loss == 0


def check_features_with_a_stride() -> None:
    """Patches that are a slice of tokens, as a model gives them."""
    tokens, texts = torch.randn(3, 7, 8), torch.randn(3, 2, 8)
    spans = patch_spans(torch.tensor([0.0, 0.0, 0.5, 0.5]).expand(3, 2, 4), (2, 3))
    options = {"grid": (2, 3), "valid": torch.ones(3, 2, dtype=torch.bool), "other_images": True, "backend": "triton"}
    scale = torch.tensor(2.0)
    sliced = dense.value_and_gradients(lambda v, t: localization(v[:, 1:], t, scale, spans, **options), [tokens, texts])
    expected = dense.value_and_gradients(
        lambda v, t: localization(v[:, 1:].double(), t.double(), scale.double(), spans, **options), [tokens, texts]
    )
    torch.testing.assert_close(sliced[0].double(), expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(sliced[1], expected[1], rtol=1e-4, atol=1e-6)


def main() -> None:
    torch.set_num_threads(1)
    for shape in SHAPES:
        for other_images in (False, True):
            check(shape, torch.float32, 20.0, other_images)
    for dtype in (torch.float64, torch.float32, torch.float16):
        for scale in (1.0, 100.0):
            for other_images in (False, True):
                check((3, (3, 4), 5, 32), dtype, scale, other_images)
    # Logits of up to ±900, so that only a running maximum keeps every sum finite.
    check((3, (3, 4), 5, 8), torch.float32, 100.0, True, length=3.0)
    kernels.PROGRAMS = 2  # several images a program
    check((5, (3, 4), 5, 32), torch.float32, 20.0, True)
    check_without_texts()
    check_features_with_a_stride()


if __name__ == "__main__":
    main()
