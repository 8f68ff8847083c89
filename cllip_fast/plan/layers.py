"""What each layer of the model keeps for backward, and the multiply-adds of its products.

The counts follow `cllip_fast.models` line by line; a tensor that two operations save is counted once. Under autocast
the residual stream and the norms are fp32, products take and give bf16 (`element` bytes a number). Small differences of
a CPU from a GPU: its autocast leaves an unmasked softmax and `F.normalize` in bf16.
"""

from __future__ import annotations

from dataclasses import dataclass

from cllip_fast.models.prompter import BOX_TOKENS
from cllip_fast.plan.settings import Settings

FP32 = 4
STATISTICS = 2 * FP32
"""Bytes a row: mean and reciprocal deviation of a norm; length and clamped length of `F.normalize`."""


@dataclass(frozen=True)
class Cost:
    """Of a layer, or of several together.

    Attributes:
        kept: bytes kept from forward to backward.
        forward, backward: multiply-adds.
        working: bytes that exist beside those kept only while backward is at one layer: the largest such layer's.
        traffic: bytes that forward must write and backward must read.
    """

    kept: int = 0
    forward: int = 0
    backward: int = 0
    working: int = 0
    traffic: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.kept + other.kept,
            self.forward + other.forward,
            self.backward + other.backward,
            max(self.working, other.working),
            self.traffic + other.traffic,
        )

    def times(self, count: int) -> Cost:
        """`count` such layers in a row."""
        return Cost(self.kept * count, self.forward * count, self.backward * count, self.working, self.traffic * count)


def kept(count: int) -> Cost:
    """`count` bytes kept for backward."""
    return Cost(kept=count, traffic=2 * count)


def product(count: int, input_gradient: bool = True) -> Cost:
    """A product of `count` multiply-adds; without `input_gradient`, backward computes one gradient instead of two."""
    return Cost(forward=count, backward=(2 if input_gradient else 1) * count)


def norm(rows: int, width: int, element: int = FP32) -> Cost:
    """Layer norm, which keeps its input."""
    return kept(rows * (width * element + STATISTICS))


def linear(rows: int, inputs: int, outputs: int, element: int) -> Cost:
    """A linear layer, which keeps its input in the products' type."""
    return kept(rows * inputs * element) + product(rows * inputs * outputs)


def normalize(rows: int, width: int, element: int) -> Cost:
    """`F.normalize`, which keeps its input and its rows' lengths."""
    return kept(rows * (width * element + STATISTICS))


def scores(count: int, element: int) -> Cost:
    """`count` softmax scores that are stored: under autocast in fp32, and in bf16 for the product that follows."""
    return kept(count * (FP32 if element == FP32 else FP32 + element))


def attention(sequences: int, length: int, width: int, heads: int, backend: str, element: int) -> Cost:
    """Attention proper: keeps queries, keys, values; its output is kept by the linear layer that follows."""
    rows = sequences * length
    matrix = scores(rows * heads * length, element) if backend == "matmul" else kept(rows * heads * FP32)
    return kept(rows * 3 * width * element) + matrix + product(2 * rows * length * width)


def mlp(rows: int, width: int, hidden: int, element: int, quick_gelu: bool = False) -> Cost:
    """Linear, GELU (which keeps its input; the quick one its sigmoid too), linear."""
    # When backward enters, gradients of the output (both types) and of the hidden layer come on top.
    working = Cost(working=rows * (hidden * element + width * (FP32 + element)))
    gelu = kept(rows * hidden * element * (2 if quick_gelu else 1))
    return linear(rows, width, hidden, element) + gelu + linear(rows, hidden, width, element) + working


def block(run: Settings, sequences: int, length: int, width: int, heads: int) -> Cost:
    """`models.blocks.Block`, checkpointed or not."""
    config, element, backend, rows = run.config, run.element, run.config.attention, sequences * length
    hidden, inputs = int(width * config.mlp_ratio), rows * width * FP32
    whole = (
        norm(rows, width)
        + linear(rows, width, 3 * width, element)
        + attention(sequences, length, width, heads, backend, element)
        + linear(rows, width, width, element)
        + norm(rows, width)
        + mlp(rows, width, hidden, element, config.quick_gelu)
    )
    casts = 0 if element == FP32 else (4 * width * width + 2 * width * hidden) * element
    if run.grad_checkpointing == "blocks":
        # The second map of the MLP comes after all that backward needs.
        return checkpointed(whole, inputs, whole.forward - rows * width * hidden, casts)
    if run.grad_checkpointing == "selective":
        outputs = rows * (3 * width + width + hidden) * element
        if backend == "matmul":
            return checkpointed(whole, inputs + outputs, 2 * rows * length * width, casts)
        return checkpointed(whole, inputs + outputs + rows * (width * element + heads * FP32), 0, casts)
    return whole


def checkpointed(cost: Cost, keeps: int, again: int, casts: int = 0) -> Cost:
    """The same layer when it keeps so many bytes: backward computes `again` multiply-adds again.

    While it is at that layer, it holds all that would have been kept, and the layer's cast weights (`casts` bytes).
    """
    return Cost(
        kept=keeps,
        forward=cost.forward,
        backward=cost.backward + again,
        working=cost.working + cost.kept - keeps + casts,
        traffic=cost.traffic + 2 * keeps,
    )


def tower(run: Settings, sequences: int, length: int, width: int, heads: int, depth: int) -> Cost:
    """All blocks of a tower."""
    return block(run, sequences, length, width, heads).times(depth)


def vision(run: Settings) -> Cost:
    """The vision tower on a batch, its pooled feature included."""
    config, element, batch = run.config, run.element, run.batch_size
    width, tokens = config.vision_width, _image_tokens(run)
    pooled = batch if config.class_token else batch * tokens
    last = kept(batch * tokens * width * FP32)  # the last block's output; the final norm may read but a part of it
    return (
        _stem(run)
        + norm(batch * tokens, width)
        + tower(run, batch, tokens, width, config.vision_heads, config.vision_depth)
        + last
        + kept(pooled * STATISTICS)
        + linear(batch, width, config.embed_dim, element)
        + normalize(batch, config.embed_dim, element)
    )


def _stem(run: Settings) -> Cost:
    """The convolutions; no gradient is wanted of the images."""
    config, element, batch = run.config, run.element, run.batch_size
    side, patches = config.image_size, config.patch_grid[0] * config.patch_grid[1]
    cost = kept(batch * 3 * side**2 * element)
    if config.stem == "patch":
        return cost + product(batch * patches * config.vision_width * 3 * config.patch_size**2, input_gradient=False)
    channels = (3, config.vision_width // 4, config.vision_width // 2, config.vision_width)
    for index in range(3):
        side //= 2
        numbers = batch * side**2 * channels[index + 1]
        cost += product(numbers * channels[index] * 4**2, input_gradient=index > 0)
        if index < 2:
            cost += kept(2 * numbers * element)  # before and after GELU
    return cost


def text(run: Settings, sequences: int, length: int) -> Cost:
    """The text tower on `sequences` texts of `length` tokens."""
    config, element = run.config, run.element
    width, rows = config.text_width, sequences * length
    ids = kept(rows * 8)
    if config.causal_text:  # one token of each text is taken to the end
        pool = kept(sequences * 16) + norm(sequences, width)
    else:
        pool = norm(rows, width) + kept(rows * element) + product(rows * width, input_gradient=False)
    return (
        ids
        + tower(run, sequences, length, width, config.text_heads, config.text_depth)
        + pool
        + linear(sequences, width, config.embed_dim, element)
        + normalize(sequences, config.embed_dim, element)
    )


def regions(run: Settings) -> Cost:
    """Everything the image side does for regions: Prompter or RoIAlign, box head, patch features."""
    config, element, batch, count = run.config, run.element, run.batch_size, run.regions
    width, embed = config.vision_width, config.embed_dim
    patches = config.patch_grid[0] * config.patch_grid[1]
    cost = Cost()
    if config.region == "prompter" and ("region" in run.parts or "grounding" in run.parts):
        cost += _remember(run)
    if "region" in run.parts:
        if config.region == "prompter":
            cost += _prompt_layer(run, count, BOX_TOKENS, FP32)
        else:
            pooling = kept(count * patches * element) + product(count * patches * width, input_gradient=False)
            cost += kept(batch * patches * STATISTICS) + pooling
        cost += linear(count, width, embed, element) + normalize(count, embed, element)
    if "grounding" in run.parts:
        unit = kept(count * STATISTICS) + linear(count, embed, width, element)
        head = linear(count, width, width, element) + kept(count * width * element)
        boxes = linear(count, width, 4, element) + kept(count * 4 * FP32)
        cost += unit + _prompt_layer(run, count, 1, element) + head + boxes
    if "patch" in run.parts:
        rows = batch * patches
        cost += kept(rows * STATISTICS) + linear(rows, width, embed, element) + normalize(rows, embed, element)
    return cost


def _remember(run: Settings) -> Cost:
    """`Prompter.remember`: the image tokens' norm (whose input the tower keeps already), projections and attention."""
    config, element, batch, tokens = run.config, run.element, run.batch_size, _image_tokens(run)
    width, rows = config.vision_width, batch * tokens
    read = kept(rows * STATISTICS)
    if config.prompter_positions:
        read += kept(rows * width * FP32)
    tokens_kept = rows * width * FP32 if config.prompter_positions else 0  # by the prompts, as all of the memory is
    if config.prompter_pool == "prompt":
        weight = kept(0 if element == FP32 else 2 * width * width * element)  # a slice, which autocast casts apart
        whole = read + weight + linear(rows, width, 2 * width, element) + kept(rows * 2 * width * element)
        if run.grad_checkpointing == "none":
            return whole
        return checkpointed(whole, tokens_kept + rows * 2 * width * element, 0)
    projections = linear(rows, width, 3 * width, element) + kept(rows * 4 * width * element)  # queries again, scaled
    matrix = kept(batch * tokens**2 * FP32) + scores(batch * tokens**2, element) + kept(rows * FP32)  # log-sum-exp
    attended = product(2 * batch * tokens**2 * width) + linear(rows, width, width, element)
    whole = read + projections + matrix + attended + kept(rows * width * element)
    if run.grad_checkpointing == "none":
        return whole
    keeps, again = tokens_kept + rows * (5 * width * element + FP32), 2 * batch * tokens**2 * width
    if run.grad_checkpointing == "blocks":
        again += 3 * rows * width * width  # not the output projection, which comes last
    return checkpointed(whole, keeps, again, 0 if element == FP32 else 4 * width * width * element)


def _prompt_layer(run: Settings, count: int, prompt: int, stream: int) -> Cost:
    """The Prompter's layer for `count` prompts of `prompt` tokens, which come in as numbers of `stream` bytes."""
    config, element = run.config, run.element
    width, tokens = config.vision_width, _image_tokens(run)
    hidden, own, rows = int(width * config.mlp_ratio), count * prompt, count * prompt
    attended = norm(own, width, stream) + linear(own, width, 3 * width, element)
    attended += kept(own * 4 * width * element) + scores(own * (prompt + tokens), element)  # queries again, scaled
    attended += product(2 * own * (prompt + tokens) * width) + linear(own, width, width, element)
    if config.prompter_pool == "all":
        rows += count * tokens
        shares = kept(count * tokens * ((1 + prompt) * FP32 + (0 if element == FP32 else prompt * element)))
        values = product(own * width * width) + kept(own * width * element)  # after the output projection
        attended += shares + values + product(2 * own * tokens * width)
    # The mean comes before the MLP's second map. Backward enters with two gradients of all that it is taken over.
    expand = norm(rows, width) + linear(rows, width, hidden, element) + kept(rows * hidden * element)
    contract = linear(count, hidden, width, element) + Cost(working=2 * rows * hidden * element)
    whole = attended + expand + contract + norm(count, width)
    if run.grad_checkpointing == "none":
        return whole
    keeps, again = own * width * stream, whole.forward
    if run.grad_checkpointing == "selective":
        projected = 5 if config.prompter_pool == "all" else 4  # queries, keys, values, output; values projected
        keeps += own * projected * width * element + rows * hidden * element
        again -= own * projected * width * width + rows * width * hidden
    casts = 0 if element == FP32 else (4 * width * width + 2 * width * hidden) * element
    return checkpointed(whole, keeps, again, casts)


def _image_tokens(run: Settings) -> int:
    grid = run.config.patch_grid
    return grid[0] * grid[1] + int(run.config.class_token)


def model_costs(run: Settings) -> dict[str, Cost]:
    """Vision tower, text tower on captions and on region texts, and what regions add, each by name."""
    costs = {"vision tower": vision(run), "text tower, captions": text(run, run.batch_size, run.text_length)}
    if run.parts:
        costs["text tower, regions"] = text(run, run.regions, run.region_length)
        costs["regions, patches"] = regions(run)
    return costs
