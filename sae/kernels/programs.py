"""What the Triton kernels run on the device, one program per block of results; nothing here uses atomics."""

import triton
import triton.language as tl


@triton.jit
def propose(
    x,
    W,
    b,
    limits,
    values,
    features,
    hidden,
    rows,
    d_in,
    d_sae,
    tiles,
    limit_stride,
    BLOCK_ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    KEEP: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Keep, of each row's products with one tile of features, the KEEP that exceed their limits by most.

    Tile t holds the features t, t + tiles, t + 2 tiles, ...: neighbours, which often fire together, are spread.
    `hidden` gets the largest excess over the limit of what is not kept. NaN counts as the largest.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tile = tl.program_id(1)
    slots = tl.arange(0, TILE)
    feature = tile + tiles * slots
    row_inside, feature_inside = row < rows, feature < d_sae
    x_rows, W_rows = row.to(tl.int64)[:, None] * d_in, feature.to(tl.int64)[:, None] * d_in
    total = tl.zeros((BLOCK_ROWS, TILE), dtype=ACCUMULATE)
    for start in range(0, d_in, BLOCK_IN):
        inner = start + tl.arange(0, BLOCK_IN)[None, :]
        left = tl.load(x + x_rows + inner, mask=row_inside[:, None] & (inner < d_in), other=0.0)
        right = tl.load(W + W_rows + inner, mask=feature_inside[:, None] & (inner < d_in), other=0.0)
        total = tl.dot(left, tl.trans(right), total, input_precision="ieee", out_dtype=ACCUMULATE)
    total += tl.load(b + feature, mask=feature_inside, other=0.0).to(ACCUMULATE)[None, :]
    limit = tl.load(limits + feature * limit_stride, mask=feature_inside, other=0.0).to(ACCUMULATE)
    excess = tl.where(total != total, float("inf"), total - limit[None, :])
    excess = tl.where(feature_inside[None, :], excess, -float("inf"))
    out = (row.to(tl.int64) * tiles + tile) * KEEP
    for place in tl.static_range(KEEP):
        best, slot = tl.max(excess, axis=1, return_indices=True)
        chosen = slots[None, :] == slot[:, None]
        value = tl.sum(tl.where(chosen, total, 0.0), axis=1)
        value = tl.where(best == -float("inf"), best, value)
        tl.store(values + out + place, value, mask=row_inside)
        tl.store(features + out + place, tile + tiles * slot, mask=row_inside)
        excess = tl.where(chosen, -float("inf"), excess)
    tl.store(hidden + row.to(tl.int64) * tiles + tile, tl.max(excess, axis=1), mask=row_inside)


@triton.jit
def weighted_sums(
    members,
    starts,
    weights,
    table,
    out,
    width,
    BLOCK: tl.constexpr,
    MEMBERS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Sum the weighted table rows of one bag's members, in their order, over one block of columns."""
    bag = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first, last = tl.load(starts + bag), tl.load(starts + bag + 1)
    total = tl.zeros((BLOCK,), dtype=ACCUMULATE)
    for start in range(first, last, MEMBERS):
        at = start + tl.arange(0, MEMBERS)
        inside = at < last
        member = tl.load(members + at, mask=inside, other=0).to(tl.int64)
        weight = tl.load(weights + at, mask=inside, other=0.0).to(ACCUMULATE)
        within = inside[:, None] & (column < width)[None, :]
        block = tl.load(table + member[:, None] * width + column[None, :], mask=within, other=0.0)
        total += tl.sum(block.to(ACCUMULATE) * weight[:, None], axis=0)
    tl.store(out + bag * width + column, total, mask=column < width)


@triton.jit
def dots(
    features,
    starts,
    g,
    W,
    out,
    width,
    BLOCK: tl.constexpr,
    MEMBERS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Multiply one row of g with the row of W of each of its codes."""
    row = tl.program_id(0).to(tl.int64)
    first, last = tl.load(starts + row), tl.load(starts + row + 1)
    for start in range(first, last, MEMBERS):
        at = start + tl.arange(0, MEMBERS)
        inside = at < last
        feature = tl.load(features + at, mask=inside, other=0).to(tl.int64)
        total = tl.zeros((MEMBERS,), dtype=ACCUMULATE)
        for begin in range(0, width, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            left = tl.load(g + row * width + column, mask=column < width, other=0.0).to(ACCUMULATE)
            within = inside[:, None] & (column < width)[None, :]
            block = tl.load(W + feature[:, None] * width + column[None, :], mask=within, other=0.0)
            total += tl.sum(block.to(ACCUMULATE) * left[None, :], axis=1)
        tl.store(out + at, total, mask=inside)
