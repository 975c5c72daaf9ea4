"""The interpreted kernels against the oracle, in float32 and in half precision."""

from dataclasses import replace

import pytest
import torch
from helpers import (
    BACKEND,
    KERNEL_CASES,
    LONG,
    SIXTEENS,
    TOLERANCES,
    assert_close,
    assert_gradients_close,
    attention,
    attention_gradients,
    case,
    run_case,
)
from precision import KERNEL, assert_as_exact_as_eager

BY_NAME = {made.name: made for made in KERNEL_CASES}
# What has to be seen in several batch entries and heads.
WHOLE = ("padding whole row", "one token")
TILES = [
    BY_NAME["R1 causal sixteens"],
    BY_NAME["R3 bidirectional fours"],
    BY_NAME["padding holes"],
    case("dropout sixteens", sizes=LONG, dropout=0.3, seed=(3, 4), is_causal=True, **SIXTEENS),
]


def shrunk(made):
    """The case with one batch entry and one head, and fewer tokens.

    Triton takes 10 ms for each of a kernel's programs, and Pallas seconds to compile what it
    interprets, so that there walks have two steps at most. The tests of a GPU have the cases as
    they are, and more. What came after 0.1.0 is about several heads, and keeps them.
    """
    sizes = dict(made.sizes)
    if not made.is_first_edition:
        sizes["batch"] = 1
    elif made.name in WHOLE:
        sizes = {"tokens": 11, **sizes}
    else:
        sizes = {"tokens": 13, **sizes, "batch": 1, "heads": 1}
    options = dict(made.options)
    if BACKEND == "jax" and made.name != "long walk":
        options["steps"] = min(options.get("steps", 4), 2)
    return replace(made, sizes=tuple(sorted(sizes.items())), options=tuple(sorted(options.items())))


CASES = KERNEL_CASES
# Compiling what Pallas interprets takes seconds a case: each option in one case at least.
PALLAS_CASES = (
    "R1 causal sixteens",
    "R2 bidirectional",
    "R3 causal",
    "R4 causal sixteens",
    "exponential threshold",
    "negative threshold",
    "backward only",
    "padding left",
    "padding holes",
    "dropout",
    "no walk",
    "long walk",
    "window 0 causal",
    "more slots than blocks",
    "one token",
)
if BACKEND == "jax":
    CASES = [BY_NAME[name] for name in PALLAS_CASES]


@pytest.mark.parametrize("case", [shrunk(made) for made in CASES], ids=str)
def test_float32(case):
    output, gradients = run_case(case, KERNEL)
    assert_close(output, case.expected, TOLERANCES["output"])
    assert_gradients_close(gradients, case.expected_gradients[1])


HALF_CASES = [
    ("R1 causal sixteens", torch.float16),
    ("R3 bidirectional fours", torch.float16),
    ("padding holes", torch.float16),
    ("R4 causal", torch.float16),
    ("dropout", torch.float16),
    ("R5 causal", torch.float16),
    ("no self edges reversible", torch.float16),
]
if BACKEND == "jax":  # Triton's interpreter knows no bfloat16
    HALF_CASES = [
        ("R1 causal sixteens", torch.bfloat16),
        ("R3 bidirectional fours", torch.bfloat16),
        ("R4 causal", torch.float16),
    ]


@pytest.mark.parametrize(("name", "dtype"), HALF_CASES)
def test_half_precision(name, dtype):
    assert_as_exact_as_eager(shrunk(BY_NAME[name]), dtype)


def test_half_precision_can_fail(monkeypatch):
    import precision

    run_kernels = precision.run_kernels

    def inexact(*arguments):
        output, gradients, neighbors = run_kernels(*arguments)
        return output, {**gradients, "key": gradients["key"] * 1.01}, neighbors

    monkeypatch.setattr(precision, "run_kernels", inexact)
    with pytest.raises(AssertionError, match="key: norm-wise and largest errors"):
        assert_as_exact_as_eager(BY_NAME["no neighbours"], torch.float16)


# Pallas has fewer cases of sizes, for the same reason.
MANY = slice(2) if BACKEND == "jax" else slice(None)


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [shrunk(made) for made in TILES[MANY]], ids=str)
def test_several_tiles(case):
    made = case
    options = {**dict(made.options), "block_size": 16}
    run = attention(made.inputs, options, KERNEL, seed=made.seed)
    output, gradients = attention_gradients(run, made.inputs)
    assert_close(output, made.expected, TOLERANCES["output"])
    assert_gradients_close(gradients, made.expected_gradients[1])


def sized(head_dim, value_dim, **options):
    return case(
        f"{head_dim} and {value_dim} features",
        sizes={"batch": 1, "heads": 1, "head_dim": head_dim, "value_dim": value_dim},
        is_causal=True,
        reversible=True,
        discoverability=True,
        window=3,
        topk=6,
        neighbor_block=2,
        **options,
    )


@pytest.mark.parametrize(
    "case",
    [sized(96, 33), sized(16, 16), sized(80, 80), sized(17, 96), sized(256, 256)][MANY],
    ids=str,
)
def test_head_sizes(case):
    output, gradients = run_case(case, KERNEL)
    assert_close(output, case.expected, TOLERANCES["output"])
    assert_gradients_close(gradients, case.expected_gradients[1])


def test_a_padded_head_size():
    made = shrunk(BY_NAME["R3 causal"])
    run = attention(made.inputs, {**dict(made.options), "head_dim_pad": 48}, KERNEL)
    output, gradients = attention_gradients(run, made.inputs)
    assert_close(output, made.expected, TOLERANCES["output"])
    assert_gradients_close(gradients, made.expected_gradients[1])
