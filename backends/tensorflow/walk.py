"""The walk with restart over the graph of similar tokens, forward and backward.

With the weights A_ij = S_ij g_j of the edges and their sums D_i, a step is P = A / D, but for
isolated tokens, which stay where they are. Horner's scheme walks what it starts from,

    Z⁽ᵐ⁾ = Z⁽⁰⁾ + (1 − α) P Z⁽ᵐ⁻¹⁾,    m = 1..T

where Z⁽⁰⁾ is V, or [V, V / π, 1 / π] with π = g D for the reciprocal walk. The backward pass walks
the transpose, G⁽ᵐ⁻¹⁾ = (1 − α) Pᵀ G⁽ᵐ⁾, from the gradient G⁽ᵀ⁾ of the last state. Then, on edges
alone,

    dZ⁽⁰⁾ = Σ_{m=0..T} G⁽ᵐ⁾                 δ_i = Σ_{m=1..T} G⁽ᵐ⁾_i · (Z⁽ᵐ⁾_i − Z⁽⁰⁾_i)
    dA_ij = ((1 − α) Σ_{m=1..T} G⁽ᵐ⁾_i · Z⁽ᵐ⁻¹⁾_j − δ_i + dlog π_i) / D_i
    db_j  = Σ_i A_ij dA_ij + dlog π_j       dS_ij = dA_ij g_j

With f the weight of a cosine, c_ij = q̂_i · k̂_j, S is h f(c_ij) for the far edges and for plain
local ones with h = 1, and ½ f(c_ij) + ½ f(c_ji) for local edges of a reversible graph, where h = ½.
Each of these terms passes on dc = h f'(c) dS, with f' = 1 for cosine edges and f' = κ f for
exponential ones, to dq̂ and dk̂. As exponential weights depend on κ c alone, κ dκ = Σ_i q̂_i · dq̂_i.

Letters: see `plan` and `lists`.
"""

import tensorflow as tf

from keras_rwr.backends.tensorflow.band import dot, transposed
from keras_rwr.backends.tensorflow.plan import first_order, sizes

_ISOLATED = 1e-6


def walk(query, key, value, bias, concentration, real, band, lists):
    """The last state of the walk, Z⁽ᵀ⁾.

    Args:
        query: Tensor of shape `(G, S, H)`, unit vectors q̂.
        key: Tensor of shape `(G, S, H)`, unit vectors k̂.
        value: Tensor of shape `(G, S, V)`, V.
        bias: Tensor of shape `(G, S, 1)`, b = log g.
        concentration: Tensor of shape `(G, 1, 1)`, κ.
        real: Tensor of shape `(G, S, 1)`, 1 at real tokens and 0 at padding.
        band: `Band`.
        lists: `Lists`, or `None` where no token has far edges.

    Returns:
        Tensor of shape `(G, S, F)`, differentiable in the first five.
    """
    options = band.options

    @tf.custom_gradient
    def run(query, key, value, bias, concentration):
        edges = Edges(query, key, bias, concentration, real, band, lists)
        start = value
        if options.reciprocal:
            inverse = edges.inverse_stationary()  # 1 / π, (G, S, 1)
            start = tf.concat([value, value * inverse, inverse], -1)
        states = walk_forward(edges, start)  # (T + 1, G, S, F)

        def gradient(upstream):
            to_start, along, factors = walk_backward(edges, states, upstream)
            to_value, to_stationary = to_start, tf.zeros_like(bias)
            if options.reciprocal:
                features = value.shape[-1]
                to_value, relative, alone = tf.split(to_start, [features, features, 1], -1)
                back = tf.reduce_sum(relative * value, -1, keepdims=True) + alone
                to_value += inverse * relative
                to_stationary = -inverse * back  # dlog π
            slope = edges.share * (along - to_stationary)
            found = edges.gradients(side_by_side(factors), side_by_side(states[:-1]), slope)
            to_query, to_key, to_bias, to_concentration = found
            return first_order(
                to_query, to_key, to_value, to_bias + to_stationary, to_concentration
            )

        return states[-1], gradient

    return run(query, key, value, bias, concentration)


def walk_forward(edges, start):
    """The states Z⁽⁰⁾ to Z⁽ᵀ⁾ from Z⁽⁰⁾: `(G, S, F)` to `(T + 1, G, S, F)`.

    A loop, here and backward, because XLA would fuse a step with those before it, and do them anew.
    """
    steps, keep_walking = edges.options.steps, 1.0 - edges.options.alpha

    def step(m, state, states):
        state = start + keep_walking * edges.step(state)
        return m + 1, state, states.write(m + 1, state)

    states = tf.TensorArray(start.dtype, steps + 1, element_shape=start.shape).write(0, start)
    loop = (0, start, states)
    _, _, states = tf.while_loop(lambda m, *_: m < steps, step, loop, maximum_iterations=steps)
    # No gradient of a loop, see `in_chunks`.
    return tf.stop_gradient(states.stack())


def walk_backward(edges, states, upstream):
    """The adjoint walk from the gradient of the last state, `(G, S, F)`.

    Returns:
        dZ⁽⁰⁾ of shape `(G, S, F)`; δ of shape `(G, S, 1)`; the factors (1 - α) G⁽ᵐ⁾ / D of m = 1 to
        T, of shape `(T, G, S, F)`.
    """
    steps, keep_walking = edges.options.steps, 1.0 - edges.options.alpha
    start = states[0]

    def step(m, upstream, to_start, along, factors):
        along += tf.reduce_sum(upstream * (states[m] - start), -1, keepdims=True)
        factor = keep_walking * edges.share * upstream
        upstream = edges.step_back(factor, keep_walking * upstream)
        return m - 1, upstream, to_start + upstream, along, factors.write(m - 1, factor)

    factors = tf.TensorArray(start.dtype, steps, element_shape=start.shape)
    loop = (steps, upstream, upstream, tf.zeros_like(edges.share), factors)
    loop = tf.while_loop(lambda m, *_: m > 0, step, loop, maximum_iterations=steps)
    _, _, to_start, along, factors = loop
    return to_start, along, factors.stack()


def side_by_side(x):
    """`(T, G, S, F)` to `(G, S, T F)`."""
    steps, groups, size, features = sizes(x)
    return tf.reshape(tf.transpose(x, (1, 2, 0, 3)), (groups, size, steps * features))


class Edges:
    """The weights of the edges, and the products with them.

    Args: see `walk`.

    Attributes:
        share: Tensor `(G, S, 1)`, 1 / D, and 0 for isolated tokens.
        local: Dict by slot of tensors `(G, C, M, M)`, A.
        far: `None` or tensor `(T, R, b)`, h f of the far edges.
        forth: Tensor `(T, R, b)`, A of the far edges from query to key.
        back: Tensor `(T, R, b)`, A of the far edges from key to query, in a mutual graph.
    """

    def __init__(self, query, key, bias, concentration, real, band, lists):
        self.query, self.key = query, key
        self.band, self.lists, self.options = band, lists, band.options
        self.concentration = concentration
        self.popularity = tf.exp(bias)  # g
        self.gain = self.popularity * real  # g of tokens that edges lead to, (G, S, 1)
        self.gains = {
            slot: tf.linalg.matrix_transpose(gain) for slot, gain in band.faced(self.gain).items()
        }  # (G, C, 1, M)
        self.local, self.far = {}, None
        degree = 0.0
        for slot in band.slots:
            terms = [weight for weight, *_ in self.local_terms(slot)]
            self.local[slot] = tf.add_n(terms) * self.gains[slot]
            degree += tf.reduce_sum(self.local[slot], -1, keepdims=True)
        degree = band.join(degree)  # (G, S, 1)
        if lists is not None:
            self.outside = lists.outside(self.options.window, self.options.causal)
            self.far = self.weigh(lists.dot(query, key), self.outside, self.sharpness_of_lists())
            self.forth = self.far * tf.linalg.matrix_transpose(lists.by_block(self.gain))
            sums = tf.reduce_sum(self.forth, -1, keepdims=True)
            degree += lists.sum_by_query(sums)
            if self.options.mutual:
                self.back = self.far * lists.by_entry(self.gain)
                sums = tf.reduce_sum(self.back, -2)[..., None]
                degree += lists.sum_by_key(sums)
        isolated = degree <= (0.0 if self.options.exponential else _ISOLATED)
        self.degree = tf.where(isolated, tf.ones_like(degree), degree)
        self.share = tf.where(isolated, tf.zeros_like(degree), 1.0 / self.degree)
        self.stay = tf.cast(isolated, degree.dtype)

    def inverse_stationary(self):
        """1 / π, π = g D: `(G, S, 1)`."""
        return 1.0 / (self.popularity * self.degree)

    # --- weights

    def weigh(self, cosine, edges, sharpness):
        """h f(c) on edges, 0 elsewhere."""
        half = 0.5 if self.options.reversible else 1.0
        if self.options.exponential:
            weights = half * tf.exp(sharpness * cosine)
        else:
            weights = half * (cosine - min(self.options.cut, 0.0))
        if self.options.cut is not None:
            edges = tf.logical_and(edges, cosine > self.options.cut)
        return tf.where(edges, weights, tf.zeros_like(weights))

    def slope(self, weights, sharpness):
        """h f'(c) of weights h f(c)."""
        if self.options.exponential:
            return sharpness * weights
        half = 0.5 if self.options.reversible else 1.0
        return half * tf.cast(weights > 0.0, weights.dtype)

    def local_terms(self, slot):
        """The terms of S in a slot: weight `(G, C, M, M)`, and what was met, in tiles."""
        near = self.band.near(slot)
        rows, columns = self.tiles
        pairs = [(rows[0], columns[1][slot])]
        if self.options.reversible:
            pairs.append((rows[1], columns[0][slot]))
        sharpness = self.concentration[..., None]
        return [(self.weigh(dot(a, b), near, sharpness), a, b) for a, b in pairs]

    @property
    def tiles(self):
        """Query and key in tiles, and what the tiles face of them."""
        both = self.query, self.key
        return [self.band.split(x) for x in both], [self.band.faced(x) for x in both]

    def sharpness_of_lists(self):
        """κ by tile, `(T, 1, 1)`."""
        return tf.gather(self.concentration, self.lists.tile_block // self.lists.blocks)

    # --- products

    def step(self, x):
        """P x: `(G, S, F)` to the same shape."""
        faced = self.band.faced(x)
        total = tf.add_n([tf.matmul(self.local[slot], faced[slot]) for slot in self.band.slots])
        total = self.band.join(total)
        if self.lists is not None:
            total += self.lists.spread(self.forth, x)
            if self.options.mutual:
                total += self.lists.collect(self.back, x)
        return self.share * total + self.stay * x

    def step_back(self, scaled, x):
        """Pᵀ x, given also x / D (0 for isolated tokens): `(G, S, F)` to the same shape."""
        tiles = self.band.split(scaled)
        total = self.band.received(
            {slot: transposed(self.local[slot], tiles) for slot in self.band.slots}
        )
        if self.lists is not None:
            total += self.lists.collect(self.forth, scaled)
            if self.options.mutual:
                total += self.lists.spread(self.back, scaled)
        return total + self.stay * x

    # --- gradients

    def gradients(self, factors, met, slope):
        """Gradients of q̂, k̂, b and κ.

        Args:
            factors: Tensor `(G, S, T F)`, the (1 - α) G⁽ᵐ⁾ / D side by side.
            met: Tensor `(G, S, T F)`, the Z⁽ᵐ⁻¹⁾ in the same order.
            slope: Tensor `(G, S, 1)`, (δ - dlog π) / D.

        Returns:
            Tensors of shapes `(G, S, H)`, `(G, S, H)`, `(G, S, 1)` and `(G, 1, 1)`.
        """
        band, sharpness = self.band, self.concentration[..., None]
        tiles, faced = band.split(factors), band.faced(met)
        slopes = band.split(slope)
        to_rows, to_columns, to_biases = [0.0, 0.0], [{}, {}], {}
        for slot in band.slots:
            change = dot(tiles, faced[slot]) - slopes  # dA, (G, C, M, M)
            to_biases[slot] = tf.reduce_sum(self.local[slot] * change, -2)[..., None]
            change *= self.gains[slot]
            for side, (weights, rows, columns) in enumerate(self.local_terms(slot)):
                turn = self.slope(weights, sharpness) * change  # dc
                to_rows[side] += tf.matmul(turn, columns)
                to_columns[1 - side][slot] = transposed(turn, rows)
        to_query, to_key = band.join(to_rows[0]), band.received(to_columns[1])
        if self.options.reversible:
            to_query += band.received(to_columns[0])
            to_key += band.join(to_rows[1])
        to_bias = band.received(to_biases)
        if self.lists is not None:
            turn, bias_part = self.far_gradients(factors, met, slope)
            to_query += self.lists.spread(turn, self.key)
            to_key += self.lists.collect(turn, self.query)
            to_bias += bias_part
        to_concentration = tf.zeros_like(self.concentration)
        if self.options.exponential:
            total = tf.reduce_sum(self.query * to_query, (1, 2), keepdims=True)
            to_concentration = total / self.concentration
        return to_query, to_key, to_bias, to_concentration

    def far_gradients(self, factors, met, slope):
        """dc of the far edges, `(T, R, b)`, and their part of db, `(G, S, 1)`."""
        lists = self.lists
        change = lists.dot(factors, met) - lists.by_entry(slope)  # dA, query to key
        found = lists.sum_by_key(tf.reduce_sum(self.forth * change, -2)[..., None])
        change *= tf.linalg.matrix_transpose(lists.by_block(self.gain))
        if self.options.mutual:
            slopes = tf.linalg.matrix_transpose(lists.by_block(slope))
            other = lists.dot(met, factors) - slopes  # dA, key to query
            found += lists.sum_by_query(tf.reduce_sum(self.back * other, -1, keepdims=True))
            change += other * lists.by_entry(self.gain)
        return self.slope(self.far, self.sharpness_of_lists()) * change, found
