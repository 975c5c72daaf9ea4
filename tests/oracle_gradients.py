"""A second formula for RWR attention, in torch float64, from which autograd gives gradients.

It takes the chosen neighbour blocks as data (no gradient flows through the selection), knows
neither Keras nor the package under test, and is itself compared with the loops of `oracle.py`. In
another dtype it is the same computation done eagerly, by whose error kernels are judged.
"""

import math

import numpy as np
import torch
from oracle import NO_BLOCK, Options, edge_threshold, is_kept

NAMES = ("query", "key", "value", "discoverability", "concentration", "lens_strength")


def unit(vectors):
    """x / max(||x||, 1e-6), with finite derivatives at 0."""
    squared = vectors.square().sum(-1, keepdim=True)
    long = squared > 1e-12
    norm = torch.where(long, torch.where(long, squared, 1.0).sqrt(), 1e-6)
    return vectors / norm


def pair_masks(real, neighbors, options):
    """(local, local in both directions, neighbour) pairs, bool, (B, N or 1, S, S)."""
    tokens = real.shape[1]
    place = torch.arange(tokens, device=real.device)
    offset = place[:, None] - place[None, :]
    both_ways = (real[:, :, None] & real[:, None, :])[:, None]
    valid = both_ways & (offset >= 0) if options.is_causal else both_ways
    window = offset.abs() <= options.window
    chosen = torch.zeros((*neighbors.shape[:3], tokens), dtype=torch.bool, device=real.device)
    block_of_key = place // options.neighbor_block
    for slot in range(neighbors.shape[-1]):
        number = neighbors[..., slot, None]
        chosen |= (number == block_of_key) & (number != NO_BLOCK)
    return valid & window, both_ways & window, chosen & valid & ~window


def edge_weight(cosine, edges, concentration, options):
    threshold = edge_threshold(options)
    if options.edge_weight == "cosine":
        weight = cosine - min(threshold, 0.0)
    else:
        weight = torch.exp(concentration[:, None, None] * (cosine - 1.0))
    return torch.where(edges & (cosine > threshold), weight, 0.0)


def transition(query, key, bias, real, neighbors, concentration, options):
    """(P, pi)."""
    cosine = torch.einsum("binh,bjnh->bnij", unit(query), unit(key))
    local, local_both, far = pair_masks(real, neighbors, options)
    if options.reversible:
        weight = edge_weight(cosine, local_both | far, concentration, options)
        weight = 0.5 * (weight + weight.mT)
        if options.is_causal:
            weight = weight.tril()
    else:
        weight = edge_weight(cosine, local | far, concentration, options)
    popularity = bias.exp()
    weight = weight * popularity[..., None, :]
    degree = weight.sum(-1)
    isolated = degree <= (1e-6 if options.edge_weight == "cosine" else 0.0)
    degree = torch.where(isolated, 1.0, degree)
    stay = torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device)
    step = torch.where(isolated[..., None], stay, weight / degree[..., None])
    return step, popularity * degree


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


def rwr_attention(
    query,
    key,
    value,
    discoverability,
    concentration,
    lens_strength,
    *,
    options: Options,
    real,
    neighbors,
    seed=(0, 0),
):
    """y (B, S, N, Hv); arrays (B, S, N, H), discoverability (N, H), the other two (N,)."""
    real = torch.as_tensor(real, device=query.device)
    neighbors = torch.as_tensor(neighbors, device=query.device)
    bias = torch.einsum("bjnh,nh->bnj", key, discoverability).clamp(-8.0, 8.0)
    step, stationary = transition(query, key, bias, real, neighbors, concentration, options)

    decay, power = 1.0 - options.alpha, torch.eye(step.shape[-1]).to(step)
    walk = options.alpha * power.expand_as(step)
    for t in range(1, options.steps + 1):
        power = step @ power
        walk = walk + options.alpha * decay**t * power
    mixed = walk
    if options.reversible and options.reciprocal_beta < 1.0:
        mass = 1.0 - decay ** (options.steps + 1)
        back = walk / stationary[..., None, :]
        back = mass * back / back.sum(-1, keepdim=True)
        mixed = options.reciprocal_beta * walk + (1.0 - options.reciprocal_beta) * back

    local, local_both, _ = pair_masks(real, neighbors, options)
    gamma = lens_strength[:, None, None]
    logits = torch.einsum("binh,bjnh->bnij", query, key) / math.sqrt(query.shape[-1])
    logits = logits + bias[..., None, :]
    kept = dropout_factor(tuple(step.shape), seed, options.dropout).to(step)
    if options.fusion == "softmax":
        valid = (real[:, :, None] & real[:, None, :])[:, None]
        valid = valid.tril() if options.is_causal else valid
        far = walked_tokens(mixed, local_both, valid, options.topk)
        logits = torch.where(local, logits, 0.0) + gamma * walk
        scores = masked_softmax(logits, local | far) * kept
    else:
        scores = masked_softmax(logits, local) * kept + gamma * mixed
    scores = scores * real[:, None, :, None]
    return torch.einsum("bnij,bjnh->binh", scores, value)


def gradients(arrays, cotangent, *, dtype=torch.float64, device="cpu", **arguments):
    """(output, gradients by name) for NumPy `arrays`, a dict with every name in `NAMES`."""

    def tensor(array):
        return torch.tensor(np.asarray(array), dtype=dtype, device=device)

    def array(result):
        return result.detach().double().cpu().numpy()

    leaves = {name: tensor(arrays[name]).requires_grad_() for name in NAMES}
    output = rwr_attention(*leaves.values(), **arguments)
    found = torch.autograd.grad(output, list(leaves.values()), tensor(cotangent), allow_unused=True)
    return array(output), {
        name: np.zeros(leaf.shape) if grad is None else array(grad)
        for (name, leaf), grad in zip(leaves.items(), found, strict=True)
    }
