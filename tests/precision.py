"""The tolerance rule of half precision.

A kernel's error against float64 is at most twice that of the same computation done eagerly in the
kernel's dtype, plus a small floor. The inputs are rounded to that dtype beforehand, so that what
counts is the arithmetic, and float64 takes the neighbours that the kernels chose, so that a
near-tie counts for nothing.
"""

import dataclasses

import numpy as np
import oracle
import oracle_gradients
import torch
from helpers import BACKEND, attention, compiled, errors, numpy
from keras import ops

from keras_rwr import _dispatch as dispatch
from keras_rwr._dispatch import KernelCall
from keras_rwr._heads import Heads, Inputs
from keras_rwr._select import select
from keras_rwr._tensors import head_major, unit
from keras_rwr._tokens import Tokens
from keras_rwr.options import Call, Options

# The active backend's kernels.
KERNEL = {"torch": "triton", "jax": "pallas"}.get(BACKEND)

# Twice the rounding of a stored result, 2^-11 and 2^-8: what is left where the eager computation
# happens to be exact. Float32's is that of `helpers.TOLERANCES`.
FLOORS = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
# Where rows have one local edge, softmax is constant and the transition nearly so: of the gradients
# of queries, keys and their biases little but roundings is left, divided by small degrees. Autograd
# subtracts equal numbers there, formulas that keep rows' sums (delta) two roundings of one number.
CANCELLING = 32.0
ONE_A_HEAD = ("discoverability", "concentration", "lens_strength")
HALF_INPUTS = ("query", "key", "value", "graph_query", "graph_key", "cotangent")


def rounded(inputs, dtype):
    """Inputs of a case that `dtype` represents exactly, within its range."""
    arrays = {**inputs.arrays(), "cotangent": inputs.cotangent}
    largest = torch.finfo(dtype).max

    def nearest(array):
        return torch.tensor(array).clamp(-largest, largest).to(dtype).float().numpy()

    return dataclasses.replace(inputs, **{name: nearest(x) for name, x in arrays.items()})


def kernel_tensors(inputs, dtype):
    """Tensors by name as a mixed-precision model has them: activations halved, weights not."""
    arrays = {**inputs.arrays(), "cotangent": inputs.cotangent}
    tensors = {name: ops.convert_to_tensor(array) for name, array in arrays.items()}
    half = str(dtype).removeprefix("torch.")
    return {name: ops.cast(x, half) if name in HALF_INPUTS else x for name, x in tensors.items()}


def chosen_neighbors(tensors, options):
    """The blocks that the kernels choose, (B, G, S, slots), as NumPy.

    Args:
        tensors: Dict from names of `keras_rwr._heads.Inputs` to tensors, `None` or numbers.
        options: Dict, the call's options.
    """
    query, key = (tensors.get(f"graph_{x}", tensors[x]) for x in ("query", "key"))
    meaning, neighbors = Options.pick(options), None
    if dispatch.runs_whole(KERNEL):
        config, mask = KernelCall(**options), tensors.get("padding_mask")
        neighbors = dispatch.load(KERNEL).select_neighbors(query, key, config, mask)
    elif meaning.steps > 0:
        stages, call = dispatch.stages(KERNEL), Call.pick(options)
        heads = Heads.create(Inputs(**tensors), meaning, call, stages.contain, stages.unit)
        neighbors = stages.select(heads.graph_query, heads.graph_key, heads.tokens, meaning)
    if neighbors is None:
        batch, size, graphs, _ = query.shape
        return np.full((batch, graphs, size, 1), oracle.NO_BLOCK)
    return ops.convert_to_numpy(neighbors)


def portable_neighbors(query, key, config, padding_mask=None):
    """The blocks that the portable stages choose, or `None`."""
    options = Options.pick(vars(config))
    tokens = Tokens.create(query.shape[1], config.is_causal, padding_mask)
    query, key = (unit(ops.where(tokens.real, head_major(x, "float32"), 0.0)) for x in (query, key))
    return select(query, key, tokens, options)


def run_kernels(case, inputs, dtype):
    """(output, gradients by name, neighbours) of the kernels, in NumPy."""
    options = dict(case.options)
    tensors = kernel_tensors(inputs, dtype)
    cotangent = tensors.pop("cotangent")
    masks = inputs.given("padding_mask", "segment_ids")
    masks = {name: ops.convert_to_tensor(mask) for name, mask in masks.items()}
    neighbors = chosen_neighbors({**tensors, **masks}, options)
    run = attention(inputs, options, KERNEL, seed=case.seed if options.get("dropout") else None)
    differentiate = {"torch": torch_gradients, "jax": jax_gradients}[BACKEND]

    def by_position(*leaves):
        return run(**dict(zip(tensors, leaves, strict=True)))

    output, *found = differentiate(by_position, list(tensors.values()), cotangent)
    kept = [x.dtype for x in (output, *found)] == [
        cotangent.dtype,
        *(x.dtype for x in tensors.values()),
    ]
    if not kept:
        raise AssertionError(f"dtypes of output and gradients: {[x.dtype for x in found]}")
    output, *found = (numpy(x).astype("float64") for x in (output, *found))
    return output, dict(zip(tensors, found, strict=True)), neighbors


def torch_gradients(run, tensors, cotangent):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = run(*leaves)
    found = torch.autograd.grad(output, leaves, cotangent, allow_unused=True)
    return output, *(
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(leaves, found, strict=True)
    )


def jax_gradients(run, tensors, cotangent):
    import jax

    def differentiate(cotangent, *tensors):
        output, pullback = jax.vjp(run, *tensors)
        return output, *pullback(cotangent)

    return compiled(differentiate)(cotangent, *tensors)


def limits(formula, dtype, cancelling=False):
    """The float64 results, and the errors that the rule allows.

    Args:
        formula: Function of a torch dtype that gives a dict from name to NumPy array, with the
            results as computed in that dtype.
        dtype: The dtype of the kernels.
        cancelling: Bool. Whether rows have one local edge. Defaults to `False`.

    Returns:
        Dict from name to the exact array, and dict from name to the allowed norm-wise and largest
        error.
    """
    truth = formula(torch.float64)

    def eager_errors(dtype):
        found = formula(dtype)
        return {name: errors(found[name], truth[name]) for name in truth}

    eager = eager_errors(dtype)
    if dtype == torch.float16 and any(max(found) == float("inf") for found in eager.values()):
        # Exponential edges leave float16's range. bfloat16 has the range, and 8 times the rounding.
        coarse = eager_errors(torch.bfloat16)
        eager = {
            name: tuple(error / 8.0 for error in coarse[name])
            if max(found) == float("inf")
            else found
            for name, found in eager.items()
        }
    allowed = {}
    for name, found in eager.items():
        # One number a head, left over from terms that cancel: its error is a matter of luck.
        floor = FLOORS[dtype] * (8.0 if name in ONE_A_HEAD else 1.0)
        if cancelling and name in ("query", "key", "discoverability"):
            floor = FLOORS[dtype] * CANCELLING
        # The largest of a million errors is a matter of luck, too.
        allowed[name] = tuple(
            factor * error + floor for factor, error in zip((2.0, 3.0), found, strict=True)
        )
    return truth, allowed


def assert_within(found, truth, allowed):
    """Raises unless every result, a dict of NumPy arrays, is as close to the truth as allowed."""
    for name, array in found.items():
        made = errors(array, truth[name])
        if any(error > limit for error, limit in zip(made, allowed[name], strict=True)):
            raise AssertionError(
                f"{name}: norm-wise and largest errors {made[0]:.1e} and {made[1]:.1e}, "
                f"allowed {allowed[name][0]:.1e} and {allowed[name][1]:.1e}"
            )


def assert_as_exact_as_eager(case, dtype):
    """Raises unless the kernels keep the rule in the output and in every gradient."""
    inputs = rounded(case.inputs, dtype)
    output, gradients, neighbors = run_kernels(case, inputs, dtype)
    arrays = inputs.arrays()

    def formula(dtype):
        output, gradients = oracle_gradients.gradients(
            arrays,
            inputs.cotangent,
            dtype=dtype,
            options=case.oracle_options,
            labels=inputs.labels(),
            neighbors=neighbors,
            seed=case.seed,
        )
        return {"output": output, **gradients}

    one_edge = case.oracle_options.window == 0 or inputs.query.shape[1] == 1
    assert_within({"output": output, **gradients}, *limits(formula, dtype, one_edge))
