"""The Prompter against the whole layer written out, and RoIAlign against a loop."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from cllip_fast.models import CllipModel
from cllip_fast.models.prompter import Prompter
from cllip_fast.models.roi_align import roi_align


def literal_layer(prompter: Prompter, image_tokens: Tensor, prompts: Tensor) -> Tensor:
    """One prompt at a time through the whole layer, as the paper says: [B, K, W]."""
    rows = []
    for tokens, image_prompts in zip(image_tokens, prompts, strict=True):
        if prompter.positions is not None:
            tokens = tokens + prompter.positions
        for prompt in image_prompts:
            x = torch.cat([prompt, tokens])
            q, k, v = prompter.qkv(prompter.norm_1(x)).chunk(3, dim=-1)
            x = x + prompter.out((q @ k.T / math.sqrt(x.shape[1])).softmax(-1) @ v)
            x = x + prompter.mlp(prompter.norm_2(x))
            pooled = x.mean(0) if prompter.pool == "all" else x[: len(prompt)].mean(0)
            rows.append(prompter.norm_out(pooled))
    return torch.stack(rows).unflatten(0, prompts.shape[:2]) if rows else prompts.sum(2)


@pytest.mark.parametrize("pool", ["all", "prompt"])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("kind", ["box", "text"])
@pytest.mark.parametrize("count", [1, 5])
def test_prompter_is_the_literal_layer(mini, inputs, pool: str, positions: bool, kind: str, count: int) -> None:
    prompter = mini(prompter_pool=pool, prompter_positions=positions, class_token=True).prompter
    tokens = torch.randn(3, 10, 16, dtype=torch.float64)
    prompt_input = inputs.boxes[:, :count] if kind == "box" else torch.randn(3, count, 12, dtype=torch.float64)
    weight = torch.randn(3, count, 16, dtype=torch.float64)
    results = []
    for run in (lambda t, p: prompter(prompter.remember(t), p), lambda t, p: literal_layer(prompter, t, p)):
        leaves = [tokens.clone().requires_grad_(), prompt_input.clone().requires_grad_()]
        prompts = prompter.box_prompts(leaves[1]) if kind == "box" else prompter.text_prompts(leaves[1])
        assert prompts.shape == (3, count, 2 if kind == "box" else 1, 16)
        output = run(leaves[0], prompts)
        parameters = [p for p in prompter.parameters() if p is not prompter.project.weight]
        gradients = torch.autograd.grad((output * weight).sum(), leaves + parameters, allow_unused=True)
        results.append((output, gradients))
    torch.testing.assert_close(results[0][0], results[1][0])
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def verbs(prompter: Prompter, tokens: Tensor, boxes: Tensor, texts: Tensor, literal: bool) -> tuple[Tensor, ...]:
    """Region features and box logits, by the layer itself or by the one written out."""
    memory = None if literal else prompter.remember(tokens)
    prompts = prompter.box_prompts(boxes), prompter.text_prompts(texts)
    regions, grounded = (literal_layer(prompter, tokens, p) if literal else prompter(memory, p) for p in prompts)
    return prompter.project(regions), prompter.box_head(grounded)


@pytest.mark.parametrize("pool", ["all", "prompt"])
@pytest.mark.parametrize("sharpness", [1.0, 40.0])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_every_gradient_is_the_literal_layers(mini, inputs, pool: str, sharpness: float, count: int) -> None:
    """To fp64's rounding, from both verbs at once; sharp scores reach thousands, beyond what exp can represent."""
    prompter = mini(prompter_pool=pool, class_token=True).prompter
    prompter.qkv.weight.data[:32] *= sharpness
    inner = torch.randn(3, 10, 16).double(), inputs.boxes[:, :count], torch.randn(3, count, 12).double()
    leaves = [tensor.requires_grad_() for tensor in inner]
    weights = torch.randn(3, count, 12).double(), torch.randn(3, count, 4).double()
    names = ["image_tokens", "boxes", "text_features", *(name for name, _ in prompter.named_parameters())]
    results = []
    for literal in (False, True):
        outputs = verbs(prompter, *leaves, literal)
        loss = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
        results.append(outputs + torch.autograd.grad(loss, [*leaves, *prompter.parameters()], materialize_grads=True))
    for name, ours, theirs in zip(["region_features", "logits", *names], *results, strict=True):
        assert ours.shape == theirs.shape
        if count:
            assert theirs.abs().max() > 0, name
            assert (ours - theirs).abs().max() < 1e-12 * sharpness**2 * theirs.abs().max(), name
        else:
            assert not ours.any(), name


@pytest.mark.parametrize("pool", ["all", "prompt"])
@pytest.mark.parametrize("autocast", [True, False])
def test_bf16_is_as_near_as_the_literal_layer_in_bf16(mini, inputs, pool: str, autocast: bool) -> None:
    """Outputs within twice, gradients within three times the literal layer's own error, as root mean squares."""
    prompter = mini(prompter_pool=pool, vision_width=64).prompter
    tokens, texts = torch.randn(3, 9, 64).double(), torch.randn(3, 5, 12).double()
    weights = torch.randn(3, 5, 12).double(), torch.randn(3, 5, 4).double()

    def run(dtype: torch.dtype, literal: bool) -> tuple[Tensor, ...]:
        module = copy.deepcopy(prompter).to(dtype)
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (tokens, inputs.boxes, texts)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            outputs = verbs(module, *leaves, literal)
            if pool == "all" and not literal and dtype != torch.float64:
                assert module.remember(leaves[0]).rows.row_lse.dtype == torch.float32
        loss = sum((output.double() * weight).sum() for output, weight in zip(outputs, weights, strict=True))
        return outputs + torch.autograd.grad(loss, [*leaves, *module.parameters()])

    low = torch.float32 if autocast else torch.bfloat16
    exact, ours, theirs = run(torch.float64, True), run(low, False), run(low, True)
    for index, (truth, mine, reference) in enumerate(zip(exact, ours, theirs, strict=True)):
        allowed = (2 if index < 2 else 3) * (reference - truth).norm()
        assert (mine - truth).norm() <= allowed


@pytest.mark.parametrize("pool", ["all", "prompt"])
def test_prompts_do_not_see_each_other(mini, inputs, pool: str) -> None:
    model = mini(prompter_pool=pool)
    tokens = model.image_tokens(inputs.images)
    regions = model.encode_regions(tokens, inputs.boxes)
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(model.encode_regions(tokens, inputs.boxes[:, order]), regions[:, order])
    torch.testing.assert_close(model.encode_regions(tokens, inputs.boxes[:, :1]), regions[:, :1])
    texts = torch.randn(3, 5, 12, dtype=torch.float64)
    boxes = model.ground(tokens, texts)
    torch.testing.assert_close(model.ground(tokens, texts[:, order]), boxes[:, order])
    torch.testing.assert_close(model.ground(tokens, 7 * texts), boxes)  # the length of the texts does not matter


def test_corners_are_told_apart(mini, inputs) -> None:
    """The two corner tokens are pooled alike: only their learned vectors say which is which."""
    model = mini()
    tokens = model.image_tokens(inputs.images)
    swapped = inputs.boxes[..., [2, 3, 0, 1]]
    assert not torch.allclose(model.encode_regions(tokens, inputs.boxes), model.encode_regions(tokens, swapped))
    model.prompter.corner_type.data.zero_()
    torch.testing.assert_close(model.encode_regions(tokens, inputs.boxes), model.encode_regions(tokens, swapped))


def test_grounded_boxes_are_ordered_and_start_in_the_middle(mini, inputs) -> None:
    model = mini()
    tokens = model.image_tokens(inputs.images)
    head = model.prompter.box_head[2]
    texts = torch.randn(3, 5, 12, dtype=torch.float64)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([2.0, -1.0, -3.0, 0.5]))  # x0 > x1, y0 < y1
    shares = torch.tensor([-3.0, -1.0, 2.0, 0.5], dtype=torch.float64).sigmoid()
    torch.testing.assert_close(model.ground(tokens, texts), shares.expand(3, 5, 4))
    fresh = CllipModel(model.config).prompter.box_head[2]
    torch.testing.assert_close(fresh.bias.sigmoid(), torch.tensor([0.25, 0.25, 0.75, 0.75]))


def naive_roi_align(patches: Tensor, box: Tensor, grid: tuple[int, int]) -> Tensor:
    """The mean over 2h × 2w points of a box, each a bilinear sample of the nearest four patches, one by one."""
    rows, columns = grid
    feature = patches.view(rows, columns, -1)
    x0, y0, x1, y1 = box.tolist()
    total = torch.zeros(feature.shape[-1], dtype=patches.dtype)
    for i in range(2 * rows):
        for j in range(2 * columns):
            y = min(max((y0 + (y1 - y0) * (i + 0.5) / (2 * rows)) * rows - 0.5, 0), rows - 1)
            x = min(max((x0 + (x1 - x0) * (j + 0.5) / (2 * columns)) * columns - 0.5, 0), columns - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
            dy, dx = y - top, x - left
            total += (1 - dy) * ((1 - dx) * feature[top, left] + dx * feature[top, right])
            total += dy * ((1 - dx) * feature[bottom, left] + dx * feature[bottom, right])
    return total / (4 * rows * columns)


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (7, 2)])
def test_roi_align_is_the_naive_loop(inputs, grid: tuple[int, int]) -> None:
    patches = torch.randn(3, grid[0] * grid[1], 6, dtype=torch.float64)
    boxes = inputs.boxes.clone()
    boxes[1, 0] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    boxes[1, 1] = torch.tensor([0.3, 0.2, 0.3, 0.9])  # no width
    expected = torch.stack(
        [torch.stack([naive_roi_align(patches[b], box, grid) for box in boxes[b]]) for b in range(3)]
    )
    torch.testing.assert_close(roi_align(patches, boxes, grid), expected)
    torch.testing.assert_close(roi_align(patches, boxes, grid)[1, 0], patches[1].mean(0))


def test_roi_align_of_the_whole_image_is_the_image_feature(mini, inputs) -> None:
    model = mini(region="roi_align")
    tokens = model.image_tokens(inputs.images)
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64).expand(3, 1, 4)
    torch.testing.assert_close(model.encode_regions(tokens, whole)[:, 0], model.encode_image(inputs.images))


def test_roi_align_of_one_patch_is_that_patchs_feature(mini, inputs) -> None:
    """A point box on a patch centre reads that patch alone, row and column not mixed up."""
    model = mini(region="roi_align", class_token=True)
    tokens = model.image_tokens(inputs.images)
    point = torch.tensor([2.5 / 3, 0.5 / 3, 2.5 / 3, 0.5 / 3], dtype=torch.float64).expand(3, 1, 4)
    torch.testing.assert_close(model.encode_regions(tokens, point)[:, 0], model.encode_patches(tokens)[:, 2])
