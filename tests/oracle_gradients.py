"""A second formula for RWR attention, in torch float64, from which autograd gives gradients.

It takes the chosen neighbour blocks as data (no gradient flows through the selection), knows
neither Keras nor the package under test, and is itself compared with the loops of `oracle.py`. In
another dtype it is the same computation done eagerly, by whose error kernels are judged.

Gradients are bounded by definition. The backward pass counts a norm below 0.1 as 0.1 and, where
edges are cosines, a degree below 1 as 1; the forward pass does not.
"""

import math

import numpy as np
import torch
from oracle import NO_BLOCK, PADDING, Options, edge_threshold, is_kept, restart_weights

NAMES = (
    "query",  # (B, S, N, H)
    "key",  # (B, S, M, H)
    "value",  # (B, S, M, V)
    "graph_query",  # (B, S, G, F)
    "graph_key",  # (B, S, G, F)
    "discoverability",  # (N, H), or (G, F) with a graph of its own
    "concentration",  # (N,), or (G,) with a graph of its own
    "lens_strength",  # (N,)
    "hop_weights",  # (T + 1,), (N, T + 1) or (B, S, N, T + 1)
)


def scale_gradient(x, factor):
    """x, whose gradient is multiplied by a constant factor."""
    return x.detach() + factor.detach() * (x - x.detach())


def unit(vectors):
    """x / max(||x||, 1e-6); the gradient counts a norm below 0.1 as 0.1."""
    squared = vectors.square().sum(-1, keepdim=True)
    long = squared > 1e-12
    norm = torch.where(long, torch.where(long, squared, 1.0).sqrt(), 1e-6)
    return scale_gradient(vectors / norm, (norm / 0.1).clamp(max=1.0))


def pair_masks(labels, neighbors, options):
    """(valid, local, local in both directions, neighbour) pairs, bool, (B, G or 1, S, S)."""
    tokens = labels.shape[1]
    place = torch.arange(tokens, device=labels.device)
    offset = place[:, None] - place[None, :]
    real = labels != PADDING
    together = (labels[:, :, None] == labels[:, None, :]) & real[:, :, None]
    together = together[:, None]
    valid = together & (offset >= 0) if options.is_causal else together
    window = offset.abs() <= options.window
    chosen = torch.zeros((*neighbors.shape[:3], tokens), dtype=torch.bool, device=labels.device)
    block_of_key = place // options.neighbor_block
    for slot in range(neighbors.shape[-1]):
        number = neighbors[..., slot, None]
        chosen |= (number == block_of_key) & (number != NO_BLOCK)
    return valid, valid & window, together & window, chosen & valid & ~window


def edge_weight(cosine, edges, concentration, options):
    threshold = edge_threshold(options)
    if options.edge_weight == "cosine":
        weight = cosine - min(threshold, 0.0)
    else:
        weight = torch.exp(concentration[:, None, None] * (cosine - 1.0))
    return torch.where(edges & (cosine > threshold), weight, 0.0)


def transition(query, key, bias, labels, neighbors, concentration, options):
    """(P, pi), (B, G, S, S) and (B, G, S)."""
    cosine = torch.einsum("bigf,bjgf->bgij", unit(query), unit(key))
    stay = torch.eye(cosine.shape[-1], dtype=cosine.dtype, device=cosine.device)
    _, local, local_both, far = pair_masks(labels, neighbors, options)
    if not options.self_edges:
        local, local_both = local & (stay == 0), local_both & (stay == 0)
    if options.reversible:
        weight = edge_weight(cosine, local_both | far, concentration, options)
        weight = 0.5 * (weight + weight.mT)
        if options.is_causal:
            weight = weight.tril()
    else:
        weight = edge_weight(cosine, local | far, concentration, options)
    popularity = bias.exp()
    isolated_below = 0.0
    if options.edge_weight == "cosine":
        isolated_below = 1e-6
        degree = (weight * popularity[..., None, :]).sum(-1, keepdim=True)
        weight = scale_gradient(weight, degree.clamp(max=1.0))
    weight = weight * popularity[..., None, :]
    degree = weight.sum(-1)
    isolated = degree <= isolated_below
    degree = torch.where(isolated, 1.0, degree)
    step = torch.where(isolated[..., None], stay, weight / degree[..., None])
    return step, popularity * degree


def hop_list(options, hop_weights):
    """theta_t for t = 0 ... T, (B, N, S, 1) or what broadcasts to it; without gamma."""
    if hop_weights is None:
        return restart_weights(options)
    if hop_weights.ndim == 4:
        hop_weights = hop_weights.transpose(1, 2)
    elif hop_weights.ndim == 2:
        hop_weights = hop_weights[:, None]
    return [hop_weights[..., t, None] for t in range(hop_weights.shape[-1])]


def dropout_factor(shape, seed, rate):
    """Keep bits divided by 1 - rate, (B, N, S, S)."""
    if rate == 0.0:
        return torch.ones(shape, dtype=torch.float64)
    kept = np.zeros(shape)
    for b, n, i, j in np.ndindex(*shape):
        kept[b, n, i, j] = is_kept(seed, b, n, i, j, rate)
    return torch.from_numpy(kept) / (1.0 - rate)


def masked_softmax(logits, mask):
    """Softmax over the masked entries; a row without any is 0."""
    return torch.softmax(logits.masked_fill(~mask, torch.finfo(logits.dtype).min), -1) * mask


def walked_tokens(mixed, local_both, valid, topk):
    """The topk tokens outside the window with the largest positive walk; ties to the lower."""
    visits = torch.where(valid & ~local_both, mixed, 0.0).detach()
    order = torch.sort(visits, dim=-1, descending=True, stable=True).indices[..., :topk]
    chosen = torch.zeros_like(visits, dtype=torch.bool).scatter_(-1, order, True)
    return chosen & (visits > 0.0)


def repeat_heads(x, heads, axis):
    return x.repeat_interleave(heads // x.shape[axis], axis)


def rwr_attention(
    query,
    key,
    value,
    *,
    graph_query=None,
    graph_key=None,
    discoverability=None,
    concentration=None,
    lens_strength=None,
    hop_weights=None,
    options: Options,
    labels,
    neighbors,
    seed=(0, 0),
):
    """y (B, S, N, V), of tensors with the shapes of `NAMES`.

    Labels (B, S) are those of `oracle.token_labels`, neighbours (B, G, S, slots) block numbers.
    """
    labels = torch.as_tensor(labels, device=query.device)
    neighbors = torch.as_tensor(neighbors, device=query.device)
    heads = query.shape[2]
    key, value = repeat_heads(key, heads, 2), repeat_heads(value, heads, 2)
    own_graph = graph_query is not None
    if not own_graph:
        graph_query, graph_key = query, key
    bias = torch.zeros_like(graph_key[..., 0]).transpose(1, 2)
    if discoverability is not None:
        bias = torch.einsum("bjgf,gf->bgj", graph_key, discoverability).clamp(-8.0, 8.0)
    step, stationary = transition(
        graph_query, graph_key, bias, labels, neighbors, concentration, options
    )
    step, stationary = repeat_heads(step, heads, 1), repeat_heads(stationary, heads, 1)

    hops = hop_list(options, hop_weights)
    power = torch.eye(step.shape[-1]).to(step).expand_as(step)
    walk = hops[0] * power
    for theta in hops[1:]:
        power = step @ power
        walk = walk + theta * power
    mixed = walk
    if options.reversible and options.reciprocal_beta < 1.0:
        back = walk / stationary[..., None, :]
        back = sum(hops) * back / back.sum(-1, keepdim=True)
        mixed = options.reciprocal_beta * walk + (1.0 - options.reciprocal_beta) * back

    gamma = 1.0 if lens_strength is None else lens_strength[:, None, None]
    valid, local, local_both, _ = pair_masks(labels, neighbors, options)
    logits = torch.einsum("binh,bjnh->bnij", query, key) / math.sqrt(query.shape[-1])
    if not own_graph:
        logits = logits + bias[..., None, :]
    kept = dropout_factor(tuple(step.shape), seed, options.dropout).to(step)
    if options.fusion == "softmax":
        far = walked_tokens(mixed, local_both, valid, options.topk)
        logits = torch.where(local, logits, 0.0) + gamma * walk
        scores = masked_softmax(logits, local | far) * kept
    else:
        scores = masked_softmax(logits, local) * kept + gamma * mixed
    scores = scores * (labels != PADDING)[:, None, :, None]
    return torch.einsum("bnij,bjnh->binh", scores, value)


def gradients(arrays, cotangent, *, dtype=torch.float64, device="cpu", **arguments):
    """(output, gradients by name) for NumPy `arrays`, a dict of any of `NAMES`."""

    def tensor(array):
        return torch.tensor(np.asarray(array), dtype=dtype, device=device)

    def array(result):
        return result.detach().double().cpu().numpy()

    leaves = {name: tensor(x).requires_grad_() for name, x in arrays.items()}
    output = rwr_attention(**leaves, **arguments)
    found = torch.autograd.grad(output, list(leaves.values()), tensor(cotangent), allow_unused=True)
    return array(output), {
        name: np.zeros(leaf.shape) if grad is None else array(grad)
        for (name, leaf), grad in zip(leaves.items(), found, strict=True)
    }
