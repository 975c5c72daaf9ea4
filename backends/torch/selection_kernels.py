"""Kernels that choose each query's key blocks outside its window.

A block's score is the product of the query with the mean of the block's unit keys; the query's
length does not matter. A tile holds rows, which are queries, and lanes: a step along the blocks
scores one block a lane, or a group of them.
"""

import triton
import triton.language as tl

from keras_rwr.backends.torch.tiles import NEVER, head_offset, load_rows, store_rows

# The last bits of a score that give way to the number of a step.
STEPS = tl.constexpr(256)
LAST_BLOCK = tl.constexpr(2**31 - 1)
NO_BLOCK = tl.constexpr(-(2**63))


@triton.jit
def average_blocks(
    key_ptr,
    mask_ptr,
    means_ptr,
    first_ptr,
    last_ptr,
    key_batch,
    key_row,
    key_head,
    size,
    heads,
    blocks,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
):
    """The mean unit key of each block, and its first and last real token where there is a mask."""
    # Neighbouring programs take neighbouring heads, which are neighbours in memory.
    tiles = tl.cdiv(blocks, BLOCKS)
    batch_entry = tl.program_id(0) // heads // tiles
    head = batch_entry * heads + tl.program_id(0) % heads
    block = tl.program_id(0) // heads % tiles * BLOCKS + tl.arange(0, BLOCKS)
    key_ptr += head_offset(head, heads, key_batch, key_head)
    features = tl.arange(0, HEAD)[None, None, :]

    total = tl.zeros((BLOCKS, HEAD), tl.float32)
    count = tl.zeros((BLOCKS,), tl.int32)
    first = tl.full((BLOCKS,), LAST_BLOCK, tl.int32)
    last = tl.full((BLOCKS,), -1, tl.int32)
    for start in range(0, WIDTH, TOKENS):
        token = start + tl.arange(0, TOKENS)
        position = block[:, None] * WIDTH + token[None, :]
        real = (token < WIDTH)[None, :] & (position < size)
        if mask_ptr is not None:
            mask_row = mask_ptr + batch_entry.to(tl.int64) * size
            real = real & (tl.load(mask_row + position, mask=real, other=0) != 0)
            first = tl.minimum(first, tl.min(tl.where(real, position, LAST_BLOCK), 1))
            last = tl.maximum(last, tl.max(tl.where(real, position, -1), 1))
        pointers = key_ptr + position.to(tl.int64)[:, :, None] * key_row + features
        inside = real[:, :, None]
        if HEAD != HEAD_SIZE:
            inside = inside & (features < HEAD_SIZE)
        key = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.maximum(tl.sum(key * key, 2), 1e-12))
        total += tl.sum(key * scale[:, :, None], 1)
        count += tl.sum(real.to(tl.int32), 1)

    means = total / tl.maximum(count, 1).to(tl.float32)[:, None]
    means_ptr += head.to(tl.int64) * blocks * HEAD_SIZE
    store_rows(means_ptr, block, HEAD_SIZE, block < blocks, means, HEAD_SIZE, HEAD)
    if mask_ptr is not None:
        # All heads share them; the first one writes.
        inside = block < tl.where(head % heads == 0, blocks, 0)
        tl.store(first_ptr + batch_entry * blocks + block, first, mask=inside)
        tl.store(last_ptr + batch_entry * blocks + block, last, mask=inside)


@triton.jit
def tile_rows(size, batch_heads, ROWS: tl.constexpr):
    """Head and first row of a program: rows with many blocks before them start first."""
    tile = tl.cdiv(size, ROWS) - 1 - tl.program_id(0) // batch_heads
    return tl.program_id(0) % batch_heads, tile * ROWS


@triton.jit
def real_rows(mask_ptr, head, heads, rows, size):
    real = rows < size
    if mask_ptr is not None:
        mask_row = mask_ptr + (head // heads).to(tl.int64) * size
        real = real & (tl.load(mask_row + rows, mask=real, other=0) != 0)
    return real


@triton.jit
def is_candidate(
    block,
    rows,
    first_ptr,
    last_ptr,
    size,
    blocks,
    window,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Whether a block holds a real token outside a row's window."""
    exists = block < blocks
    if first_ptr is not None:
        first = tl.load(first_ptr + block, mask=exists, other=LAST_BLOCK)
    else:
        first = block * WIDTH
    candidate = first < rows - window
    if not CAUSAL:
        if last_ptr is not None:
            last = tl.load(last_ptr + block, mask=exists, other=-1)
        else:
            last = tl.where(exists, tl.minimum(block * WIDTH + WIDTH, size) - 1, -1)
        candidate = candidate | (last > rows + window)
    return candidate


@triton.jit
def order(score, block):
    """One number for both: larger scores are larger, of equal scores that of the lower block."""
    bits = score.to(tl.int32, bitcast=True)
    # Sign and magnitude become a two's complement, and -0 the 0 that it equals.
    bits = tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    return (bits.to(tl.int64) << 32) - block


@triton.jit
def ordered_block(number):
    """The block of a number from `order`, -1 for `NO_BLOCK`."""
    return tl.where(number == NO_BLOCK, -1, -number & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def keep_two(best, second, x):
    """The two largest of three, where `best >= second`."""
    return tl.maximum(best, x), tl.maximum(second, tl.minimum(best, x))


@triton.jit
def store_slots(neighbors_ptr, head, rows, size, slot, best, second, SLOTS: tl.constexpr):
    row_ptr = neighbors_ptr + (head.to(tl.int64) * size + rows) * SLOTS + slot
    tl.store(row_ptr, best, mask=rows < size)
    if SLOTS > 1:
        tl.store(row_ptr + 1, second, mask=(rows < size) & (slot + 1 < SLOTS))


@triton.jit
def pack_step(score, step):
    """A score whose last bits say which step it is from, so that one maximum keeps both."""
    bits = (score.to(tl.int32, bitcast=True) & -STEPS) | (STEPS - 1 - step)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def best_group(packed, GROUP: tl.constexpr):
    """First block of each row's best group by numbers from `pack_step`, -1 for none, and lane."""
    LANES: tl.constexpr = packed.shape[1]
    best = tl.max(packed, 1)
    lanes = tl.arange(0, LANES)[None, :]
    lane = tl.min(tl.where(packed == best[:, None], lanes, LANES - 1), 1)
    step = STEPS - 1 - (best.to(tl.int32, bitcast=True) & (STEPS - 1))
    return tl.where(best > 0.5 * NEVER, step * (GROUP * LANES) + lane, -1), lane


@triton.jit
def select_two(
    query_ptr,
    mask_ptr,
    means_ptr,
    first_ptr,
    last_ptr,
    chosen_ptr,
    query_batch,
    query_row,
    query_head,
    size,
    heads,
    batch_heads,
    blocks,
    window,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
):
    """The one or two best groups of each query, in one pass of at most `STEPS` steps.

    A group is GROUP blocks that share a lane in one step, named by its first block; it scores what
    its best block scores. Each lane keeps its two best groups. Scores that agree in 15 of their 23
    fraction bits may count as equal.
    """
    head, first_row = tile_rows(size, batch_heads, ROWS)
    last_row = tl.minimum(first_row + ROWS, size) - 1
    rows = first_row + tl.arange(0, ROWS)
    real = real_rows(mask_ptr, head, heads, rows, size)
    query_ptr += head_offset(head, heads, query_batch, query_head)
    query = load_rows(query_ptr, rows, query_row, real, HEAD_SIZE, HEAD)
    means_ptr += head.to(tl.int64) * blocks * HEAD_SIZE
    if mask_ptr is not None:
        first_ptr += head // heads * blocks
        last_ptr += head // heads * blocks

    # Up to `left` and from `right` to `whole`, all blocks are candidates of all rows: the even
    # parts of the pass.
    SPAN: tl.constexpr = GROUP * LANES
    steps = tl.cdiv(blocks, SPAN)
    whole = blocks // SPAN
    left = tl.cdiv(tl.maximum(first_row - window, 0), WIDTH) // SPAN
    right = tl.cdiv((last_row + window) // WIDTH + 1, SPAN)
    if mask_ptr is not None:
        left = 0
        right = whole
    if CAUSAL:
        right = tl.cdiv(tl.cdiv(tl.maximum(last_row - window, 0), WIDTH), SPAN)
    else:
        right = tl.maximum(tl.minimum(right, whole), left)

    best = tl.full((ROWS, LANES), NEVER, tl.float32)
    second = best
    for part in tl.static_range(2 if CAUSAL else 4):
        begin = 0 if part == 0 else left if part == 1 else right if part == 2 else whole
        end = left if part == 0 else right if part == 1 else whole if part == 2 else steps
        for step in tl.range(begin, end, num_stages=STAGES):
            score = tl.full((ROWS, LANES), NEVER, tl.float32)
            for member in tl.static_range(GROUP):
                block = (step * GROUP + member) * LANES + tl.arange(0, LANES)
                exists = tl.full((LANES,), True, tl.int1) if part % 2 == 0 else block < blocks
                means = load_rows(means_ptr, block, HEAD_SIZE, exists, HEAD_SIZE, HEAD)
                product = tl.dot(query, tl.trans(means))
                if part % 2 == 1:
                    candidate = is_candidate(
                        block[None, :],
                        rows[:, None],
                        first_ptr,
                        last_ptr,
                        size,
                        blocks,
                        window,
                        WIDTH,
                        CAUSAL,
                    )
                    product = tl.where(candidate, product, NEVER)
                score = tl.maximum(score, product) if member > 0 else product
            best, second = keep_two(best, second, pack_step(score, step))

    best_block, lane = best_group(best, GROUP)
    rest = tl.where(tl.arange(0, LANES)[None, :] == lane[:, None], second, best)
    second_block, _ = best_group(rest, GROUP)
    best_block = tl.where(real, best_block, -1)
    second_block = tl.where(real, second_block, -1)
    store_slots(chosen_ptr, head, rows, size, 0, best_block, second_block, SLOTS)


@triton.jit
def select_members(
    query_ptr,
    groups_ptr,
    means_ptr,
    first_ptr,
    last_ptr,
    neighbors_ptr,
    query_batch,
    query_row,
    query_head,
    size,
    heads,
    batch_heads,
    blocks,
    window,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
):
    """The one or two best blocks of each query among those of its groups from `select_two`."""
    head, first_row = tile_rows(size, batch_heads, ROWS)
    rows = first_row + tl.arange(0, ROWS)
    query_ptr += head_offset(head, heads, query_batch, query_head)
    groups_ptr += (head.to(tl.int64) * size + rows) * SLOTS
    means_ptr += head.to(tl.int64) * blocks * HEAD_SIZE
    if first_ptr is not None:
        first_ptr += head // heads * blocks
        last_ptr += head // heads * blocks
    best = tl.full((ROWS,), NO_BLOCK, tl.int64)
    second = best
    query = load_rows(query_ptr, rows, query_row, rows < size, HEAD_SIZE, HEAD).to(tl.float32)
    for slot in tl.static_range(SLOTS):
        group = tl.load(groups_ptr + slot, mask=rows < size, other=-1)
        for member in tl.static_range(GROUP):
            block = tl.where(group < 0, blocks, group + member * LANES)
            candidate = is_candidate(
                block, rows, first_ptr, last_ptr, size, blocks, window, WIDTH, CAUSAL
            )
            means = load_rows(means_ptr, block, HEAD_SIZE, block < blocks, HEAD_SIZE, HEAD)
            score = tl.sum(query * means.to(tl.float32), 1)
            number = tl.where(candidate, order(score, block), NO_BLOCK)
            best, second = keep_two(best, second, number)
    best_block, second_block = ordered_block(best), ordered_block(second)
    store_slots(neighbors_ptr, head, rows, size, 0, best_block, second_block, SLOTS)


@triton.jit
def select_all(
    query_ptr,
    mask_ptr,
    means_ptr,
    first_ptr,
    last_ptr,
    neighbors_ptr,
    query_batch,
    query_row,
    query_head,
    size,
    heads,
    batch_heads,
    blocks,
    window,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    PART: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
):
    """The best blocks of each query in any number and exactly, ties to the lower block.

    Each pass over the blocks finds the best two that no pass before it took.
    """
    head, first_row = tile_rows(size, batch_heads, ROWS)
    last_row = tl.minimum(first_row + ROWS, size) - 1
    rows = first_row + tl.arange(0, ROWS)
    real = real_rows(mask_ptr, head, heads, rows, size)
    query_ptr += head_offset(head, heads, query_batch, query_head)
    means_ptr += head.to(tl.int64) * blocks * HEAD_SIZE
    if mask_ptr is not None:
        first_ptr += head // heads * blocks
        last_ptr += head // heads * blocks
    end = blocks
    if CAUSAL:
        end = tl.cdiv(tl.maximum(last_row - window, 0), WIDTH)

    taken = tl.full((ROWS,), 2**63 - 1, tl.int64)
    for slot in range(0, SLOTS, 2):
        best = tl.full((ROWS, LANES), NO_BLOCK, tl.int64)
        second = best
        for start in range(0, end, LANES):
            block = start + tl.arange(0, LANES)
            score = tl.zeros((ROWS, LANES), tl.float32)
            for feature in tl.static_range(0, HEAD_SIZE, PART):
                query = load_rows(query_ptr, rows, query_row, real, HEAD_SIZE, PART, feature)
                means = load_rows(
                    means_ptr, block, HEAD_SIZE, block < blocks, HEAD_SIZE, PART, feature
                )
                score = tl.dot(query, tl.trans(means), score, input_precision="ieee")
            candidate = is_candidate(
                block[None, :],
                rows[:, None],
                first_ptr,
                last_ptr,
                size,
                blocks,
                window,
                WIDTH,
                CAUSAL,
            )
            number = order(score, block[None, :])
            free = candidate & real[:, None] & (number < taken[:, None])
            best, second = keep_two(best, second, tl.where(free, number, NO_BLOCK))
        best_number = tl.max(best, 1)
        taken = tl.max(tl.where(best == best_number[:, None], second, best), 1)
        best_block = ordered_block(best_number)
        store_slots(neighbors_ptr, head, rows, size, slot, best_block, ordered_block(taken), SLOTS)


@triton.jit
def label_entries(
    neighbors_ptr,
    labels_ptr,
    entries,
    head_entries,
    blocks,
    lists,
    first_label,
    ENTRIES: tl.constexpr,
):
    """The number of the list that each entry belongs to, counted from `first_label`."""
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    block = tl.load(neighbors_ptr + entry, mask=entry < entries, other=-1)
    label = entry // head_entries * blocks + block
    label = tl.where(block < 0, lists, label) + first_label
    tl.store(labels_ptr + entry, label.to(labels_ptr.dtype.element_ty), mask=entry < entries)
