"""LOCAL: softmax attention within the window, forward and backward.

    LOCAL_i = Σ_j p_ij v_j,   p_ij = exp(l_ij − lse_i),   l_ij = q_i·k_j / √H + b_j

Slots of a tile come one after another with an online softmax, and the backward pass makes p again
from the rows' lse, as FlashAttention does (https://arxiv.org/abs/2205.14135). With the output's
gradient dO and the keep factors m of dropout:

    dv_j = Σ_i m_ij p_ij dO_i       dl_ij = p_ij (m_ij dO_i·v_j − dO_i·LOCAL_i)
    dq_i = Σ_j dl_ij k_j / √H       dk_j = Σ_i dl_ij q_i / √H       db_j = Σ_i dl_ij
"""

import tensorflow as tf

from keras_rwr.backends.tensorflow.band import dot, transposed
from keras_rwr.backends.tensorflow.dropout import keep_factor
from keras_rwr.backends.tensorflow.plan import first_order

# The logit of a pair that does not exist, and the least peak of a row: a row without any pair has
# weights exp(-1e30 + 1e20), which are 0.
NEGATIVE = -1e30
_LEAST_PEAK = -1e20


def windowed_attention(query, key, value, key_bias, band, row_hashes=None):
    """LOCAL; a query without a key gets 0.

    Args:
        query: Tensor of shape `(G, S, H)`.
        key: Tensor of shape `(G, S, H)`.
        value: Tensor of shape `(G, S, V)`.
        key_bias: Tensor of shape `(G, S, 1)`, b, or `NEGATIVE` at padding.
        band: `Band`.
        row_hashes: `None` or dropout's, of shape `(G, S, 1)`.

    Returns:
        Tensor of shape `(G, S, V)`, differentiable in the first four.
    """
    scale = query.shape[-1] ** -0.5
    rate = band.options.dropout

    def logits(rows, columns, bias, slot):
        found = dot(rows, columns) + tf.linalg.matrix_transpose(bias)
        return tf.where(band.near(slot), found, NEGATIVE)  # (G, C, M, M)

    def kept(slot, dtype):
        return keep_factor(band.split(row_hashes, 0), band.keys(slot), rate, dtype)

    @tf.custom_gradient
    def attend(query, key, value, key_bias):
        rows = band.split(query * scale)
        keys, values = band.faced(key), band.faced(value)
        biases = band.faced(key_bias, NEGATIVE)
        peak, total, mixed = _LEAST_PEAK, 0.0, 0.0
        for slot in band.slots:
            found = logits(rows, keys[slot], biases[slot], slot)
            previous, peak = peak, tf.maximum(tf.reduce_max(found, -1, keepdims=True), peak)
            correction = tf.exp(previous - peak)  # (G, C, M, 1)
            weights = tf.exp(found - peak)
            total = correction * total + tf.reduce_sum(weights, -1, keepdims=True)
            if row_hashes is not None:
                weights *= kept(slot, weights.dtype)
            mixed = correction * mixed + tf.matmul(weights, values[slot])
        total = tf.where(total > 0.0, total, tf.ones_like(total))
        output, lse = band.join(mixed / total), peak + tf.math.log(total)

        def gradient(upstream):
            along = band.split(tf.reduce_sum(upstream * output, -1, keepdims=True))
            upstream = band.split(upstream)
            to_rows, to_keys, to_values, to_biases = 0.0, {}, {}, {}
            for slot in band.slots:
                weights = tf.exp(logits(rows, keys[slot], biases[slot], slot) - lse)
                change = dot(upstream, values[slot])
                passed = weights
                if row_hashes is not None:
                    factor = kept(slot, weights.dtype)
                    change, passed = change * factor, weights * factor
                change = weights * (change - along)  # (G, C, M, M)
                to_rows += tf.matmul(change, keys[slot])
                to_keys[slot] = transposed(change, rows)
                to_values[slot] = transposed(passed, upstream)
                to_biases[slot] = tf.reduce_sum(change, -2)[..., None]
            return first_order(
                scale * band.join(to_rows),
                band.received(to_keys),
                band.received(to_values),
                band.received(to_biases),
            )

        return output, gradient

    return attend(query, key, value, key_bias)
