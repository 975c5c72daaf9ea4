"""The gate before any timing: every peer is compared with the definition of what it computes."""

import math

import numpy as np
from keras import ops

from benchmarks import frameworks, peers
from benchmarks.cases import make_inputs

# Largest error allowed, relative to the largest value of a tensor. In float32 two orders of
# summation differ by some dozen roundings (6e-8), and gradients of weights sum over all tokens.
# Below it, results are rounded at the end (2^-11, 2^-8), and layers round their projections too.
TOLERANCES = {"float32": 5e-5, "float16": 4e-3, "bfloat16": 3e-2}
# Gradients pass through the states of the walk and their adjoints, each rounded when it is stored.
GRADIENT_FACTORS = {"float32": 1.0, "float16": 2.0, "bfloat16": 2.0}

# A tensor this much smaller than the largest one is roundings of terms that cancel, such as the
# gradient of a key's bias.
SMALLEST_SCALES = {"float32": 1e-2, "float16": 1e-1, "bfloat16": 1e-1}


class ParityError(Exception):
    """Some peer does not compute what it should: there is nothing to measure."""


def prepare(case, peer, variant):
    """The call of a peer, see `Framework.prepare`."""
    framework = frameworks.active()
    inputs = make_inputs(case, framework.normal_numbers())
    function, arrays = peer.build(case, inputs)
    cotangent = ops.convert_to_tensor(inputs["cotangent"], case.dtype) if case.gradients else None
    return framework.prepare(function, arrays, cotangent, variant)


def results(case, peer, variant):
    """Output and gradients of a peer as float64 arrays."""
    tensors = prepare(case, peer, variant)()
    return [
        ops.convert_to_numpy(ops.cast(ops.stop_gradient(x), "float32")).astype("float64")
        for x in tensors
    ]


def check_parity(case, chosen, variants):
    """Compares peers with the definitions of what they compute, on a few tokens.

    Args:
        case: `Case`; its sequence length does not matter.
        chosen: List of `Peer`.
        variants: List of strings.

    Returns:
        List of dicts with the keys "step", "level", "head_size", "gradients", "peer", "variant",
        "error" and "tolerance".

    Raises:
        ParityError: If an error is larger than its tolerance, or not a number.
    """
    case = case.small()
    tolerance = TOLERANCES[case.dtype]
    if case.gradients:
        tolerance *= GRADIENT_FACTORS[case.dtype]
    plain = frameworks.active().default_variants[0]
    expected = {}
    for definition in {peer.definition for peer in chosen}:
        right = peers.PEERS[case.level, peers.DEFINITIONS[definition]]
        # A block's score that is off by a TF32 rounding may make a token choose another block.
        with frameworks.active().exact():
            expected[definition] = results(case, right, plain)
    checks = []
    for peer in chosen:
        for variant in variants:
            error = largest_error(
                results(case, peer, variant), expected[peer.definition], case.dtype
            )
            checks.append(
                {
                    **{x: getattr(case, x) for x in ("step", "level", "head_size", "gradients")},
                    "peer": peer.name,
                    "variant": variant,
                    "error": error,
                    "tolerance": tolerance,
                }
            )
    wrong = [check for check in checks if not check["error"] <= tolerance]
    if wrong:
        raise ParityError(
            "peers must agree with their definition. Received: "
            + ", ".join(f"{x['peer']} ({x['variant']}) is off by {x['error']:.1e}" for x in wrong)
            + f", tolerance {tolerance:.0e}"
        )
    return checks


def largest_error(arrays, expected, dtype="float32"):
    """Largest error of any array relative to its largest value; not a number where either is."""
    if [x.shape for x in arrays] != [x.shape for x in expected]:
        return math.inf
    floor = SMALLEST_SCALES[dtype] * max(np.abs(x).max() for x in expected)
    errors = [
        np.abs(x - right).max() / max(np.abs(right).max(), floor)
        for x, right in zip(arrays, expected, strict=True)
    ]
    return float(np.max(errors))  # np.max keeps what is not a number, max would not
