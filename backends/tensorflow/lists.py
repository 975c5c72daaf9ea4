"""Far edges in lists by key block.

An entry is a query with one of the blocks that it chose. Sorted by block and cut into tiles of
entries that share their block, entries meet a block's keys in one small product a tile, and sums
into keys go over sorted tiles: no entry is scattered by itself.

Letters: E entries, R entries in a tile, T tiles, J blocks of a sequence, b keys in a block.
"""

import tensorflow as tf

from keras_rwr.backends.tensorflow.band import dot, transposed
from keras_rwr.backends.tensorflow.plan import ceil_div, sizes

_ENTRIES = 16  # R
# Numbers gathered at once: it bounds the largest buffer, whatever the length.
_GATHERED = 2**23
# In blocks of fewer keys, what an entry gets from its block is larger than what it takes there, so
# that sums go over the entries of a query instead.
_NARROW = 4


class Lists:
    """Entries by block, and where each of them stands.

    Args:
        neighbors: Int tensor of shape `(G, S, slots)`, block numbers, -1 for none.
        block: Int, b.

    Attributes:
        tile_block: Int tensor `(T,)`, the block of each tile among the G J blocks.
        entry_row: Int tensor `(T, R)`, the query of each entry among the G S queries.
        is_entry: Bool tensor `(T, R)`, false where a tile has fewer entries.
        is_chosen: Bool tensor `(G, S, slots)`.
        place: Int tensor `(G, S, slots)`, where each entry stands among the T R places.
        block_row: Int tensor `(G, S, slots)`, the chosen block among the G J blocks.
    """

    def __init__(self, neighbors, block):
        self.block, self.slots = block, neighbors.shape[-1]
        self.is_chosen = neighbors >= 0
        groups, size, slots = self.groups, self.size, self.slots
        count, blocks = groups * size * slots, groups * self.blocks

        first_block = tf.range(groups)[:, None, None] * self.blocks
        self.block_row = tf.maximum(neighbors, 0) + first_block
        # Entries without a block come last, in a list of their own that gets no tile.
        block_of = tf.reshape(tf.where(self.is_chosen, self.block_row, blocks), (-1,))  # (E,)
        order = tf.argsort(block_of, stable=True)
        ones = tf.ones_like(block_of)
        lengths = tf.math.unsorted_segment_sum(ones, block_of, blocks + 1)[:-1]
        starts = tf.cumsum(lengths, exclusive=True)  # (G J,)
        ends = starts + lengths
        tiles = ceil_div(lengths, _ENTRIES)
        first_tile = tf.cumsum(tiles, exclusive=True)

        most = (count + blocks * (_ENTRIES - 1)) // _ENTRIES  # T
        lists_begun = tf.math.unsorted_segment_sum(tf.ones_like(first_tile), first_tile, most + 1)
        self.tile_block = tf.cumsum(lists_begun)[:-1] - 1
        at = tf.gather(starts, self.tile_block)
        at += (tf.range(most) - tf.gather(first_tile, self.tile_block)) * _ENTRIES
        at = at[:, None] + tf.range(_ENTRIES)  # (T, R), places in the sorted order
        self.is_entry = at < tf.gather(ends, self.tile_block)[:, None]
        self.entry_row = tf.gather(order, tf.where(self.is_entry, at, 0)) // slots

        sorted_block = tf.minimum(tf.gather(block_of, order), blocks - 1)
        rank = tf.range(count) - tf.gather(starts, sorted_block)
        place = tf.gather(first_tile, sorted_block) * _ENTRIES + rank
        place = tf.gather(place, tf.math.invert_permutation(order))
        place = tf.where(self.is_chosen, tf.reshape(place, (groups, size, slots)), 0)
        self.place = place

    # Sizes are taken from a shape where they are needed, see `Band`.

    @property
    def groups(self):
        """G: an int, or a scalar tensor."""
        return sizes(self.is_chosen)[0]

    @property
    def size(self):
        """S: an int, or a scalar tensor."""
        return sizes(self.is_chosen)[1]

    @property
    def blocks(self):
        """J: an int, or a scalar tensor."""
        return ceil_div(self.size, self.block)

    def outside(self, window, causal):
        """Which keys of the entries are outside of their query's window: bool `(T, R, b)`."""
        row = (self.entry_row % self.size)[..., None]
        key = (self.tile_block % self.blocks * self.block)[:, None, None] + tf.range(self.block)
        outside = key < row - window
        if not causal:
            outside = tf.logical_or(outside, key > row + window)
        return tf.logical_and(outside, self.is_entry[..., None])

    # --- between tokens and entries

    def by_entry(self, x):
        """`(G, S, F)` to each entry's query, `(T, R, F)`."""
        return tf.gather(self.rows(x), self.entry_row)

    def by_block(self, x):
        """`(G, S, F)` to the keys of each tile's block, `(T, b, F)`."""
        return tf.gather(self.keys(x), self.tile_block)

    def rows(self, x):
        """`(G, S, F)` to `(G S, F)`."""
        return tf.reshape(x, (-1, x.shape[-1]))

    def keys(self, x):
        """`(G, S, F)` to `(G J, b, F)`, zeros behind the last position."""
        extra = self.blocks * self.block - self.size
        if not (isinstance(extra, int) and extra == 0):
            x = tf.pad(x, [[0, 0], [0, extra], [0, 0]])
        return tf.reshape(x, (-1, self.block, x.shape[-1]))

    def sum_by_query(self, x):
        """Sums over each query's entries: `(T, R, F)` to `(G, S, F)`."""
        return tf.reduce_sum(self.of_query(x), -2)

    def of_query(self, x):
        """Each query's entries, 0 for those that are none: `(T, R, F)` to `(G, S, slots, F)`."""
        found = tf.gather(tf.reshape(x, (-1, x.shape[-1])), self.place)
        return tf.where(self.is_chosen[..., None], found, tf.zeros_like(found))

    def sum_by_key(self, x):
        """Sums over the tiles of each block: `(T, b, F)` to `(G, S, F)`."""
        total = tf.math.unsorted_segment_sum(x, self.tile_block, self.groups * self.blocks)
        joined = tf.reshape(total, (self.groups, self.blocks * self.block, x.shape[-1]))
        return joined[:, : self.size]

    # --- products

    def dot(self, rows, keys):
        """Products of query and key vectors of the edges: twice `(G, S, F)` to `(T, R, b)`."""
        rows, keys = self.rows(rows), self.keys(keys)

        def product(entry_row, tile_block):
            return dot(tf.gather(rows, entry_row), tf.gather(keys, tile_block))

        width = (_ENTRIES + self.block) * rows.shape[-1]
        return in_chunks(product, (self.entry_row, self.tile_block), width, rows.dtype)

    def spread(self, weights, x):
        """`Σ_j weights_ij x_j` for each query i: `(T, R, b)` and `(G, S, F)` to `(G, S, F)`."""
        keys = self.keys(x)
        if self.block >= _NARROW:

            def product(weights, tile_block):
                return tf.matmul(weights, tf.gather(keys, tile_block))

            width = (_ENTRIES + self.block) * x.shape[-1]
            arrays = weights, self.tile_block
            return self.sum_by_query(in_chunks(product, arrays, width, x.dtype))

        def total(weights, block_row):
            gathered = tf.gather(keys, block_row)  # (rows, slots, b, F)
            return tf.einsum("rsb,rsbf->rf", weights, gathered)

        weights = tf.reshape(self.of_query(weights), (-1, self.slots, self.block))
        block_row = tf.reshape(self.block_row, (-1, self.slots))
        width = self.slots * self.block * x.shape[-1]
        found = in_chunks(total, (weights, block_row), width, x.dtype)
        return tf.reshape(found, (self.groups, self.size, x.shape[-1]))

    def collect(self, weights, x):
        """`Σ_i weights_ij x_i` for each key j: `(T, R, b)` and `(G, S, F)` to `(G, S, F)`."""
        rows = self.rows(x)

        def product(weights, entry_row):
            return transposed(weights, tf.gather(rows, entry_row))

        width = (_ENTRIES + self.block) * x.shape[-1]
        return self.sum_by_key(in_chunks(product, (weights, self.entry_row), width, x.dtype))


def in_chunks(function, arrays, width, dtype):
    """Applies a function to chunks of arrays along their first axis, one after another.

    No gradient flows through it: the backward pass is written out. Where TensorFlow differentiates
    what a compiled function hands to its backward pass, a loop would hand over lists.

    Args:
        function: Takes chunks of the arrays and returns one tensor with as many items.
        arrays: Tuple of tensors with the same number of items.
        width: Int. Numbers that the function gathers and makes for an item.
        dtype: The dtype of the function's result.

    Returns:
        Tensor of the function's results in the order of the items.
    """
    most = max(1, _GATHERED // width)
    items = sizes(arrays[0])[0]
    if isinstance(items, int) and items <= most:
        return function(*arrays)
    chunk = min(most, items) if isinstance(items, int) else tf.minimum(most, items)
    chunks = ceil_div(items, chunk)

    def split(x):
        shape = sizes(x)
        x = tf.pad(x, [[0, chunks * chunk - items], *([[0, 0]] * (len(shape) - 1))])
        return tf.reshape(x, (chunks, chunk, *shape[1:]))

    result = tf.map_fn(
        lambda chunk: function(*chunk),
        tuple(split(x) for x in arrays),
        fn_output_signature=dtype,
    )
    result = tf.stop_gradient(result)
    shape = sizes(result)
    return tf.reshape(result, (chunks * chunk, *shape[2:]))[:items]
