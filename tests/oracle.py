"""The definition of RWR attention in NumPy float64 and explicit loops.

Written from the specification alone: it imports neither Keras nor the package under test, so it
cannot share their mistakes. Every function but the last few works on one (batch, head); `i` is a
query, `j` a key, `block` a block of keys. It is slow on purpose: one line here is one sentence of
the specification. Weights are plain numbers: float64 holds all that a concentration of 64 and
biases of 8 make of them.

Letters: B batch, S positions, N query heads, M key/value heads, G graphs, H and F sizes, T steps.
"""

import dataclasses
import math

import numpy as np

NO_BLOCK = -1
PADDING = 0  # the label of padding
UINT32 = 0xFFFFFFFF


@dataclasses.dataclass(frozen=True)
class Options:
    """The plain-number options, under the specification's names and defaults."""

    alpha: float = 0.2
    steps: int = 4
    topk: int = 32
    neighbor_block: int = 16
    window: int = 128
    threshold: float | None = None
    edge_weight: str = "cosine"
    reversible: bool = False
    reciprocal_beta: float = 0.5
    fusion: str = "sum"
    self_edges: bool = True
    is_causal: bool = False
    dropout: float = 0.0


@dataclasses.dataclass(frozen=True)
class Graph:
    """Everything the walk on one graph needs; matrices are (S, S), vectors (S,)."""

    bias: np.ndarray  # b
    neighbors: np.ndarray  # (S, topk / neighbor_block) block numbers, -1 = none
    weight: np.ndarray  # W
    symmetric: np.ndarray  # S of the specification: W, or the reversible half-sum
    transition: np.ndarray  # P
    degree: np.ndarray  # D, 1 for isolated tokens
    stationary: np.ndarray  # pi = g D


# --- the graph -----------------------------------------------------------------------------------


def unit(vector):
    """x / max(||x||, 1e-6)."""
    return vector / max(math.sqrt(float(vector @ vector)), 1e-6)


def unit_rows(matrix):
    return np.stack([unit(row) for row in matrix])


def are_together(i, j, labels):
    """Are both tokens of one segment? Padding tokens neither see nor are seen."""
    return bool(labels[i] == labels[j] != PADDING)


def is_valid(i, j, labels, options):
    """May query i see key j?"""
    return are_together(i, j, labels) and (j <= i or not options.is_causal)


def is_local(i, j, options):
    return abs(i - j) <= options.window


def is_local_edge(i, j, options):
    """Is the pair in the window of the walk, which may leave out the token itself?"""
    return is_local(i, j, options) and (options.self_edges or i != j)


def block_tokens(block, tokens, options):
    """The key positions of one block; the last block may be shorter."""
    first = block * options.neighbor_block
    return range(first, min(first + options.neighbor_block, tokens))


def block_mean(block, key_unit, labels):
    """Mean of the normalised keys over the block's non-padding tokens."""
    members = [key_unit[j] for j in block if labels[j] != PADDING]
    return sum(members) / len(members)


def block_candidates(i, query_unit, key_unit, labels, options):
    """(score, block) of every block with a valid token outside i's window."""
    tokens = len(query_unit)
    candidates = []
    for number in range(math.ceil(tokens / options.neighbor_block)):
        members = block_tokens(number, tokens, options)
        if any(is_valid(i, j, labels, options) and not is_local(i, j, options) for j in members):
            score = float(query_unit[i] @ block_mean(members, key_unit, labels))
            candidates.append((score, number))
    return candidates


def select_neighbors(query_unit, key_unit, labels, options):
    """Each query's best blocks, best first, ties to the lower number; -1 where it has fewer."""
    tokens = len(query_unit)
    slots = options.topk // options.neighbor_block
    chosen = np.full((tokens, slots), NO_BLOCK, dtype=np.int64)
    for i in range(tokens):
        candidates = block_candidates(i, query_unit, key_unit, labels, options)
        candidates.sort(key=lambda candidate: (-candidate[0], candidate[1]))
        for slot, (_, number) in enumerate(candidates[:slots]):
            chosen[i, slot] = number
    return chosen


def neighbor_tokens(i, neighbors, labels, options):
    """G_i: the valid tokens outside the window in the blocks that i chose."""
    tokens = len(neighbors)
    found = set()
    for number in neighbors[i]:
        if number == NO_BLOCK:
            continue
        for j in block_tokens(int(number), tokens, options):
            if is_valid(i, j, labels, options) and not is_local(i, j, options):
                found.add(j)
    return found


def edge_threshold(options):
    if options.threshold is not None:
        return options.threshold
    return 0.0 if options.edge_weight == "cosine" else -math.inf


def edge_weight(cosine, concentration, options):
    """f(c)."""
    threshold = edge_threshold(options)
    if not cosine > threshold:
        return 0.0
    if options.edge_weight == "cosine":
        return cosine - min(threshold, 0.0)
    return math.exp(concentration * (cosine - 1.0))


def weight_matrix(query_unit, key_unit, labels, neighbors, concentration, options, both_ways=False):
    """W. With `both_ways` the window also reaches the later tokens of a causal model."""
    tokens = len(query_unit)
    weight = np.zeros((tokens, tokens))
    for i in range(tokens):
        far = neighbor_tokens(i, neighbors, labels, options)
        for j in range(tokens):
            local = is_local_edge(i, j, options)
            seen = is_valid(i, j, labels, options)
            if local and both_ways:
                seen = are_together(i, j, labels)
            if seen and (local or j in far):
                cosine = float(query_unit[i] @ key_unit[j])
                weight[i, j] = edge_weight(cosine, concentration, options)
    return weight


def reversible_matrix(weight_both_ways, options):
    """(W + W^T) / 2, cut to j <= i when causal."""
    tokens = len(weight_both_ways)
    symmetric = np.zeros((tokens, tokens))
    for i in range(tokens):
        for j in range(tokens):
            if j <= i or not options.is_causal:
                symmetric[i, j] = 0.5 * (weight_both_ways[i, j] + weight_both_ways[j, i])
    return symmetric


def key_bias(key, discoverability):
    """b_j = clip(k_j . u, -8, 8) with the unnormalised key; 0 without discoverability."""
    if discoverability is None:
        return np.zeros(len(key))
    return np.array([min(max(float(row @ discoverability), -8.0), 8.0) for row in key])


def transition_matrix(symmetric, bias, options):
    """(P, D): rows S_ij g_j / D_i; an isolated token stays where it is and has degree 1."""
    tokens = len(symmetric)
    transition = np.zeros((tokens, tokens))
    degree = np.zeros(tokens)
    lowest = 1e-6 if options.edge_weight == "cosine" else 0.0
    for i in range(tokens):
        total = sum(symmetric[i, j] * math.exp(bias[j]) for j in range(tokens))
        if total <= lowest:
            transition[i, i] = 1.0
            degree[i] = 1.0
            continue
        degree[i] = total
        for j in range(tokens):
            transition[i, j] = symmetric[i, j] * math.exp(bias[j]) / total
    return transition, degree


def build_graph(query, key, labels, options, concentration, discoverability=None, neighbors=None):
    """A whole graph; `neighbors` replaces the selection when given."""
    query_unit, key_unit = unit_rows(query), unit_rows(key)
    if neighbors is None:
        neighbors = select_neighbors(query_unit, key_unit, labels, options)
    weight = weight_matrix(query_unit, key_unit, labels, neighbors, concentration, options)
    symmetric = weight
    if options.reversible:
        both_ways = weight_matrix(
            query_unit, key_unit, labels, neighbors, concentration, options, both_ways=True
        )
        symmetric = reversible_matrix(both_ways, options)
    bias = key_bias(key, discoverability)
    transition, degree = transition_matrix(symmetric, bias, options)
    return Graph(bias, neighbors, weight, symmetric, transition, degree, np.exp(bias) * degree)


# --- the walk ------------------------------------------------------------------------------------


def restart_weights(options):
    """alpha (1 - alpha)^t for t = 0 ... T."""
    return [options.alpha * (1.0 - options.alpha) ** t for t in range(options.steps + 1)]


def walk_mass(options):
    """rho = 1 - (1 - alpha)^(steps + 1)."""
    return 1.0 - (1.0 - options.alpha) ** (options.steps + 1)


def walk_matrix(transition, weights):
    """sum_t theta_t P^t, by dense powers; weights (T + 1,), or (S, T + 1) for each token's own."""
    power = np.eye(len(transition))
    walk = np.zeros_like(transition)
    for theta in np.asarray(weights).T:
        walk = walk + theta.reshape(-1, 1) * power
        power = transition @ power
    return walk


def reciprocal_matrix(walk, stationary, mass, beta):
    """beta r + (1 - beta) r_back, r_back the row-normalised transpose of the walk."""
    mass = np.broadcast_to(mass, len(walk))
    mixed = np.zeros_like(walk)
    for i in range(len(walk)):
        back = walk[i] / stationary
        mixed[i] = beta * walk[i] + (1.0 - beta) * mass[i] * back / back.sum()
    return mixed


def forward_and_mixed_walk(graph, options, weights=None):
    """(r, r_recip); the two are the same without `reversible` or with beta = 1."""
    weights = restart_weights(options) if weights is None else weights
    walk = walk_matrix(graph.transition, weights)
    if options.reversible and options.reciprocal_beta < 1.0:
        mass = np.sum(weights, axis=-1)  # rho
        return walk, reciprocal_matrix(walk, graph.stationary, mass, options.reciprocal_beta)
    return walk, walk


# --- dropout -------------------------------------------------------------------------------------


def hash_mix(h):
    """murmur3's 32-bit finaliser."""
    h &= UINT32
    h ^= h >> 16
    h = (h * 0x85EBCA6B) & UINT32
    h ^= h >> 13
    h = (h * 0xC2B2AE35) & UINT32
    return h ^ (h >> 16)


def is_kept(seed, batch, head, i, j, rate):
    """The keep bit of pair (i, j): a hash of its coordinates, nothing else."""
    low, high = seed
    row = hash_mix(hash_mix(hash_mix(hash_mix(hash_mix(low) ^ high) ^ batch) ^ head) ^ i)
    draw = hash_mix(row + j * 0x9E3779B9) & 0x7FFFFFFF
    return draw >= math.floor(rate * 2**31)


def drop(probabilities, seed, batch, head, rate):
    """Dropped probabilities are 0, kept ones are divided by 1 - rate."""
    if rate == 0.0:
        return probabilities
    dropped = np.zeros_like(probabilities)
    for i, j in np.argwhere(probabilities > 0.0).tolist():
        if is_kept(seed, batch, head, i, j, rate):
            dropped[i, j] = probabilities[i, j] / (1.0 - rate)
    return dropped


# --- LOCAL and the two fusions -------------------------------------------------------------------


def softmax(logits):
    """Softmax of a list of numbers."""
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def dot_logit(query, key, i, j, bias):
    return float(query[i] @ key[j]) / math.sqrt(query.shape[-1]) + bias[j]


def local_tokens(i, labels, options):
    """L_i; LOCAL keeps the token itself."""
    tokens = range(len(labels))
    return [j for j in tokens if is_local(i, j, options) and is_valid(i, j, labels, options)]


def local_probabilities(query, key, labels, bias, options):
    """LOCAL's attention matrix; a query with no valid key has a row of zeros."""
    tokens = len(query)
    probabilities = np.zeros((tokens, tokens))
    for i in range(tokens):
        local = local_tokens(i, labels, options)
        if local:
            probabilities[i, local] = softmax([dot_logit(query, key, i, j, bias) for j in local])
    return probabilities


def walked_tokens(i, mixed_walk, labels, options):
    """R_i: the topk tokens outside the window that the walk visits most; ties to the lower."""
    visited = [
        j
        for j in range(len(mixed_walk))
        if mixed_walk[i, j] > 0.0
        and is_valid(i, j, labels, options)
        and not is_local(i, j, options)
    ]
    return sorted(visited, key=lambda j: (-mixed_walk[i, j], j))[: options.topk]


def fused_probabilities(query, key, labels, bias, lens_strength, walk, mixed_walk, options):
    """One softmax over L_i and R_i, the walk added to the logits."""
    tokens = len(query)
    probabilities = np.zeros((tokens, tokens))
    for i in range(tokens):
        local = local_tokens(i, labels, options)
        far = walked_tokens(i, mixed_walk, labels, options)
        logits = [dot_logit(query, key, i, j, bias) + lens_strength * walk[i, j] for j in local]
        logits += [lens_strength * walk[i, j] for j in far]
        if logits:
            probabilities[i, local + far] = softmax(logits)
    return probabilities


def head_scores(query, key, labels, bias, graph, weights, lens_strength, options, seed, position):
    """The effective dense matrix of one head: y = A v. Rows of padding queries are 0."""
    walk, mixed_walk = forward_and_mixed_walk(graph, options, weights)
    if options.fusion == "softmax":
        probabilities = fused_probabilities(
            query, key, labels, bias, lens_strength, walk, mixed_walk, options
        )
        scores = drop(probabilities, seed, *position, options.dropout)
    else:
        probabilities = local_probabilities(query, key, labels, bias, options)
        probabilities = drop(probabilities, seed, *position, options.dropout)
        scores = probabilities + lens_strength * mixed_walk
    return np.where(labels[:, None] != PADDING, scores, 0.0)


# --- all heads -----------------------------------------------------------------------------------


def token_labels(shape, padding_mask=None, segment_ids=None):
    """The segment of each token, numbered from 1, and `PADDING`: ints (B, S)."""
    labels = np.ones(shape, dtype=np.int64)
    if segment_ids is not None:
        labels += np.unique(segment_ids, return_inverse=True)[1].reshape(shape)
    if padding_mask is not None:
        labels[~np.asarray(padding_mask).astype(bool)] = PADDING
    return labels


def convolve(keys, kernel, padding_mask=None, segment_ids=None):
    """Graph keys sum_m a_m * keys_(j - m), both (B, S, G, F); a is (c, G, F).

    What lies before the start, is padding or is of another segment counts as 0.
    """
    labels = token_labels(keys.shape[:2], padding_mask, segment_ids)
    convolved = np.zeros(keys.shape)
    for b, j in np.ndindex(*labels.shape):
        for m in range(min(len(kernel), j + 1)):
            if are_together(j, j - m, labels[b]):
                convolved[b, j] += kernel[m] * keys[b, j - m]
    return convolved


def repeat_heads(x, heads):
    """Head n of `heads` uses head n M // heads of (B, S, M, F)."""
    x = np.asarray(x, np.float64)
    return np.stack([x[:, :, n * x.shape[2] // heads] for n in range(heads)], axis=2)


def graph_vectors(query, key, graph_query=None, graph_key=None):
    """What graphs are built from, (B, S, G, F): each query head's own q and k by default."""
    if graph_query is None:
        graph_query, graph_key = query, repeat_heads(key, np.shape(query)[2])
    return np.asarray(graph_query, np.float64), np.asarray(graph_key, np.float64)


def graphs(
    query,
    key,
    options,
    *,
    graph_query=None,
    graph_key=None,
    concentration=20.0,
    discoverability=None,
    padding_mask=None,
    segment_ids=None,
    neighbors=None,
):
    """All graphs as a nested list [batch][graph]; query is (B, S, N, H), key (B, S, M, H)."""
    query, key = graph_vectors(query, key, graph_query, graph_key)
    batch, tokens, number, _ = query.shape
    labels = token_labels((batch, tokens), padding_mask, segment_ids)
    kappa = np.broadcast_to(np.asarray(concentration, np.float64), (number,))
    return [
        [
            build_graph(
                query[b, :, g],
                key[b, :, g],
                labels[b],
                options,
                kappa[g],
                None if discoverability is None else np.asarray(discoverability, np.float64)[g],
                None if neighbors is None else np.asarray(neighbors)[b, g],
            )
            for g in range(number)
        ]
        for b in range(batch)
    ]


def hop_weights_of_tokens(options, hop_weights, shape):
    """theta (B, S, N, T + 1) from any of its shapes; the restart's, without gamma, by default."""
    if hop_weights is None:
        hop_weights = restart_weights(options)
    hop_weights = np.asarray(hop_weights, np.float64)
    return np.broadcast_to(hop_weights, (*shape, hop_weights.shape[-1]))


def attention_scores(
    query,
    key,
    options,
    *,
    lens_strength=None,
    hop_weights=None,
    seed=(0, 0),
    graph_query=None,
    padding_mask=None,
    segment_ids=None,
    **graph_arguments,
):
    """A with y = A v, (B, N, S, S); the last arguments are those of `graphs`."""
    built = graphs(
        query,
        key,
        options,
        graph_query=graph_query,
        padding_mask=padding_mask,
        segment_ids=segment_ids,
        **graph_arguments,
    )
    query = np.asarray(query, np.float64)
    batch, tokens, heads, _ = query.shape
    key = repeat_heads(key, heads)
    labels = token_labels((batch, tokens), padding_mask, segment_ids)
    weights = hop_weights_of_tokens(options, hop_weights, (batch, tokens, heads))
    if lens_strength is None:
        lens_strength = 0.3 if hop_weights is None else 1.0
    gamma = np.broadcast_to(np.asarray(lens_strength, np.float64), (heads,))
    scores = np.zeros((batch, heads, tokens, tokens))
    for b, n in np.ndindex(batch, heads):
        graph = built[b][n * len(built[b]) // heads]
        scores[b, n] = head_scores(
            query[b, :, n],
            key[b, :, n],
            labels[b],
            graph.bias if graph_query is None else np.zeros(tokens),
            graph,
            weights[b, :, n],
            gamma[n],
            options,
            seed,
            (b, n),
        )
    return scores


def rwr_attention(query, key, value, options, **arguments):
    """y, (B, S, N, V); value is (B, S, M, V)."""
    scores = attention_scores(query, key, options, **arguments)
    return np.einsum("bnij,bjnh->binh", scores, repeat_heads(value, scores.shape[1]))


def token_importance(
    query, key, options, *, hop_weights=None, padding_mask=None, segment_ids=None, **arguments
):
    """sum_i r_ij / (number of real tokens), (B, S, N); 0 at padding. r has no gamma."""
    arguments = {**arguments, "padding_mask": padding_mask, "segment_ids": segment_ids}
    built = graphs(query, key, options, **arguments)
    shape = np.shape(query)[:3]
    weights = hop_weights_of_tokens(options, hop_weights, shape)
    real = token_labels(shape[:2], padding_mask) != PADDING
    importance = np.zeros(shape)
    for b, n in np.ndindex(shape[0], shape[2]):
        graph = built[b][n * len(built[b]) // shape[2]]
        walk = walk_matrix(graph.transition, weights[b, :, n])
        for j in np.flatnonzero(real[b]):
            importance[b, j, n] = walk[real[b], j].sum() / real[b].sum()
    return importance
