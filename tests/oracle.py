"""The definition of RWR attention in NumPy float64 and explicit loops.

Written from the specification alone: it imports neither Keras nor the package under test, so it
cannot share their mistakes. Every function but the last few works on one (batch, head); `i` is a
query, `j` a key, `block` a block of keys. It is slow on purpose: one line here is one sentence of
the specification.
"""

import dataclasses
import math

import numpy as np

NO_BLOCK = -1
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
    is_causal: bool = False
    dropout: float = 0.0


@dataclasses.dataclass(frozen=True)
class Graph:
    """Everything the walk of one (batch, head) runs on; matrices are (S, S), vectors (S,)."""

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


def is_valid(i, j, real, options):
    """May query i see key j? Padding tokens neither see nor are seen."""
    return bool(real[i] and real[j] and (j <= i or not options.is_causal))


def is_local(i, j, options):
    return abs(i - j) <= options.window


def block_tokens(block, tokens, options):
    """The key positions of one block; the last block may be shorter."""
    first = block * options.neighbor_block
    return range(first, min(first + options.neighbor_block, tokens))


def block_mean(block, key_unit, real):
    """Mean of the normalised keys over the block's non-padding tokens."""
    members = [key_unit[j] for j in block if real[j]]
    return sum(members) / len(members)


def block_candidates(i, query_unit, key_unit, real, options):
    """(score, block) of every block with a valid token outside i's window."""
    tokens = len(query_unit)
    candidates = []
    for number in range(math.ceil(tokens / options.neighbor_block)):
        members = block_tokens(number, tokens, options)
        if any(is_valid(i, j, real, options) and not is_local(i, j, options) for j in members):
            score = float(query_unit[i] @ block_mean(members, key_unit, real))
            candidates.append((score, number))
    return candidates


def select_neighbors(query_unit, key_unit, real, options):
    """Each query's best blocks, best first, ties to the lower number; -1 where it has fewer."""
    tokens = len(query_unit)
    slots = options.topk // options.neighbor_block
    chosen = np.full((tokens, slots), NO_BLOCK, dtype=np.int64)
    for i in range(tokens):
        candidates = block_candidates(i, query_unit, key_unit, real, options)
        candidates.sort(key=lambda candidate: (-candidate[0], candidate[1]))
        for slot, (_, number) in enumerate(candidates[:slots]):
            chosen[i, slot] = number
    return chosen


def neighbor_tokens(i, neighbors, real, options):
    """G_i: the valid tokens outside the window in the blocks that i chose."""
    tokens = len(neighbors)
    found = set()
    for number in neighbors[i]:
        if number == NO_BLOCK:
            continue
        for j in block_tokens(int(number), tokens, options):
            if is_valid(i, j, real, options) and not is_local(i, j, options):
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


def weight_matrix(query_unit, key_unit, real, neighbors, concentration, options, both_ways=False):
    """W. With `both_ways` the window also reaches the later tokens of a causal model."""
    tokens = len(query_unit)
    weight = np.zeros((tokens, tokens))
    for i in range(tokens):
        far = neighbor_tokens(i, neighbors, real, options)
        for j in range(tokens):
            local = is_local(i, j, options)
            seen = real[i] and real[j] if local and both_ways else is_valid(i, j, real, options)
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


def build_graph(query, key, real, options, concentration, discoverability=None, neighbors=None):
    """The whole graph of one head; `neighbors` replaces the selection when given."""
    query_unit, key_unit = unit_rows(query), unit_rows(key)
    if neighbors is None:
        neighbors = select_neighbors(query_unit, key_unit, real, options)
    weight = weight_matrix(query_unit, key_unit, real, neighbors, concentration, options)
    symmetric = weight
    if options.reversible:
        both_ways = weight_matrix(
            query_unit, key_unit, real, neighbors, concentration, options, both_ways=True
        )
        symmetric = reversible_matrix(both_ways, options)
    bias = key_bias(key, discoverability)
    transition, degree = transition_matrix(symmetric, bias, options)
    return Graph(neighbors, weight, symmetric, transition, degree, np.exp(bias) * degree)


# --- the walk ------------------------------------------------------------------------------------


def walk_mass(options):
    """rho = 1 - (1 - alpha)^(steps + 1)."""
    return 1.0 - (1.0 - options.alpha) ** (options.steps + 1)


def walk_matrix(transition, options):
    """R = alpha sum_t (1 - alpha)^t P^t, by dense powers."""
    power = np.eye(len(transition))
    walk = np.zeros_like(transition)
    for t in range(options.steps + 1):
        walk = walk + options.alpha * (1.0 - options.alpha) ** t * power
        power = power @ transition
    return walk


def reciprocal_matrix(walk, stationary, mass, beta):
    """beta r + (1 - beta) r_back, r_back the row-normalised transpose of the walk."""
    mixed = np.zeros_like(walk)
    for i in range(len(walk)):
        back = walk[i] / stationary
        mixed[i] = beta * walk[i] + (1.0 - beta) * mass * back / back.sum()
    return mixed


def forward_and_mixed_walk(graph, options):
    """(r, r_recip); the two are the same without `reversible` or with beta = 1."""
    walk = walk_matrix(graph.transition, options)
    if options.reversible and options.reciprocal_beta < 1.0:
        beta = options.reciprocal_beta
        return walk, reciprocal_matrix(walk, graph.stationary, walk_mass(options), beta)
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


def local_probabilities(query, key, real, bias, options):
    """LOCAL's attention matrix; a query with no valid key has a row of zeros."""
    tokens = len(query)
    probabilities = np.zeros((tokens, tokens))
    for i in range(tokens):
        local = [
            j for j in range(tokens) if is_local(i, j, options) and is_valid(i, j, real, options)
        ]
        if local:
            probabilities[i, local] = softmax([dot_logit(query, key, i, j, bias) for j in local])
    return probabilities


def walked_tokens(i, mixed_walk, real, options):
    """R_i: the topk tokens outside the window that the walk visits most; ties to the lower."""
    visited = [
        j
        for j in range(len(mixed_walk))
        if is_valid(i, j, real, options) and not is_local(i, j, options) and mixed_walk[i, j] > 0.0
    ]
    return sorted(visited, key=lambda j: (-mixed_walk[i, j], j))[: options.topk]


def fused_probabilities(query, key, real, bias, lens_strength, walk, mixed_walk, options):
    """One softmax over L_i and R_i, the walk added to the logits."""
    tokens = len(query)
    probabilities = np.zeros((tokens, tokens))
    for i in range(tokens):
        local = [
            j for j in range(tokens) if is_local(i, j, options) and is_valid(i, j, real, options)
        ]
        far = walked_tokens(i, mixed_walk, real, options)
        logits = [dot_logit(query, key, i, j, bias) + lens_strength * walk[i, j] for j in local]
        logits += [lens_strength * walk[i, j] for j in far]
        if logits:
            probabilities[i, local + far] = softmax(logits)
    return probabilities


def head_scores(
    query,
    key,
    real,
    options,
    lens_strength,
    concentration,
    discoverability,
    neighbors,
    seed,
    position,
):
    """The effective dense matrix of one head: y = A v. Rows of padding queries are 0."""
    batch, head = position
    graph = build_graph(query, key, real, options, concentration, discoverability, neighbors)
    walk, mixed_walk = forward_and_mixed_walk(graph, options)
    bias = key_bias(key, discoverability)
    if options.fusion == "softmax":
        probabilities = fused_probabilities(
            query, key, real, bias, lens_strength, walk, mixed_walk, options
        )
        scores = drop(probabilities, seed, batch, head, options.dropout)
    else:
        probabilities = local_probabilities(query, key, real, bias, options)
        probabilities = drop(probabilities, seed, batch, head, options.dropout)
        scores = probabilities + lens_strength * mixed_walk
    return np.where(real[:, None], scores, 0.0)


# --- all heads -----------------------------------------------------------------------------------


def real_tokens(query, padding_mask):
    batch, tokens = query.shape[:2]
    if padding_mask is None:
        return np.ones((batch, tokens), dtype=bool)
    return np.asarray(padding_mask).astype(bool)


def per_head(value, heads):
    return np.broadcast_to(np.asarray(value, dtype=np.float64), (heads,))


def graphs(
    query,
    key,
    options,
    *,
    concentration=20.0,
    discoverability=None,
    padding_mask=None,
    neighbors=None,
):
    """Graphs of every head as a nested list [batch][head]; query and key are (B, S, N, H)."""
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    real = real_tokens(query, padding_mask)
    heads = query.shape[2]
    kappa = per_head(concentration, heads)
    return [
        [
            build_graph(
                query[b, :, n],
                key[b, :, n],
                real[b],
                options,
                kappa[n],
                None if discoverability is None else np.asarray(discoverability, np.float64)[n],
                None if neighbors is None else np.asarray(neighbors)[b, n],
            )
            for n in range(heads)
        ]
        for b in range(len(query))
    ]


def attention_scores(
    query,
    key,
    options,
    *,
    lens_strength=0.3,
    concentration=20.0,
    discoverability=None,
    padding_mask=None,
    neighbors=None,
    seed=(0, 0),
):
    """A with y = A v, (B, N, S, S)."""
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    real = real_tokens(query, padding_mask)
    batch, tokens, heads, _ = query.shape
    gamma, kappa = per_head(lens_strength, heads), per_head(concentration, heads)
    scores = np.zeros((batch, heads, tokens, tokens))
    for b in range(batch):
        for n in range(heads):
            scores[b, n] = head_scores(
                query[b, :, n],
                key[b, :, n],
                real[b],
                options,
                gamma[n],
                kappa[n],
                None if discoverability is None else np.asarray(discoverability, np.float64)[n],
                None if neighbors is None else np.asarray(neighbors)[b, n],
                seed,
                (b, n),
            )
    return scores


def rwr_attention(query, key, value, options, **arguments):
    """y, (B, S, N, Hv)."""
    scores = attention_scores(query, key, options, **arguments)
    return np.einsum("bnij,bjnh->binh", scores, np.asarray(value, np.float64))


def token_importance(query, key, options, *, padding_mask=None, **arguments):
    """sum_i r_ij / (number of real tokens), (B, S, N); 0 at padding."""
    real = real_tokens(query, padding_mask)
    rows = graphs(query, key, options, padding_mask=padding_mask, **arguments)
    batch, tokens, heads, _ = np.asarray(query).shape
    importance = np.zeros((batch, tokens, heads))
    for b in range(batch):
        for n in range(heads):
            walk = walk_matrix(rows[b][n].transition, options)
            for j in range(tokens):
                if real[b, j]:
                    visits = sum(walk[i, j] for i in range(tokens) if real[b, i])
                    importance[b, j, n] = visits / real[b].sum()
    return importance
