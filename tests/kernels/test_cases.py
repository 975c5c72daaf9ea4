"""The interpreted kernels against the oracle, in float32 and in float16."""

import functools
from dataclasses import replace

import pytest
import torch
from helpers import (
    FOURS,
    LONG,
    SIXTEENS,
    SUM_CASES,
    TOLERANCES,
    assert_close,
    assert_gradients_close,
    attention,
    attention_gradients,
    case,
    run_case,
)
from precision import assert_as_exact_as_eager

BY_NAME = {made.name: made for made in SUM_CASES}
# What has to be seen in several batch entries and heads.
WHOLE = ("padding whole row", "one token")
TILES = [
    BY_NAME["R1 causal sixteens"],
    BY_NAME["R3 bidirectional fours"],
    BY_NAME["padding holes reversible"],
    case("dropout sixteens", sizes=LONG, dropout=0.3, seed=(3, 4), is_causal=True, **SIXTEENS),
]


def shrunk(made):
    """The case with one batch entry and one head, and fewer tokens.

    Interpreting takes 10 ms for each of a kernel's programs, of which each block of keys has one.
    tests/test_gpu_kernels.py has the cases as they are, and four more.
    """
    sizes = dict(made.sizes)
    if made.name in WHOLE:
        sizes = {"tokens": 11, **sizes}
    else:
        sizes = {"tokens": 13, **sizes, "batch": 1, "heads": 1}
    return replace(made, sizes=tuple(sorted(sizes.items())))


@pytest.mark.parametrize("case", [shrunk(made) for made in SUM_CASES[:-4]], ids=str)
def test_float32(case):
    output, gradients = run_case(case, "triton")
    assert_close(output, case.expected, TOLERANCES["output"])
    assert_gradients_close(gradients, case.expected_gradients[1])


@pytest.mark.parametrize(
    "name",
    [
        "R1 causal sixteens",
        "R3 bidirectional fours",
        "padding holes reversible",
        "exponential threshold",
        "dropout",
    ],
)
def test_float16(name):
    assert_as_exact_as_eager(shrunk(BY_NAME[name]), torch.float16)


def test_memory_is_poisoned():
    assert torch.empty(3).isnan().all()
    assert torch.ones(3).new_empty(5).isnan().all()
    assert (torch.empty_like(torch.ones(3, dtype=torch.int32)) == 2**31 - 1).all()


def test_half_precision_can_fail(monkeypatch):
    import precision

    run_kernels = precision.run_kernels

    def inexact(*arguments):
        output, gradients, neighbors = run_kernels(*arguments)
        return output, {**gradients, "key": gradients["key"] * 1.01}, neighbors

    monkeypatch.setattr(precision, "run_kernels", inexact)
    with pytest.raises(AssertionError, match="key: norm-wise and largest errors"):
        assert_as_exact_as_eager(BY_NAME["no neighbours"], torch.float16)


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [shrunk(made) for made in TILES], ids=str)
def test_several_tiles(case):
    made = case
    options = {**dict(made.options), "block_size": 16}
    run = attention(made.inputs, options, "triton", seed=made.seed)
    output, gradients = attention_gradients(run, made.inputs, made.discoverability)
    assert_close(output, made.expected, TOLERANCES["output"])
    assert_gradients_close(gradients, made.expected_gradients[1])


def sized(head_dim, value_dim, **options):
    return case(
        f"{head_dim} and {value_dim} features",
        sizes={"batch": 1, "heads": 1, "head_dim": head_dim, "value_dim": value_dim},
        is_causal=True,
        edge_weight="exponential",
        reversible=True,
        discoverability=True,
        window=3,
        topk=6,
        neighbor_block=2,
        **options,
    )


@pytest.mark.parametrize(
    "case", [sized(16, 16), sized(80, 80), sized(96, 33), sized(17, 96), sized(256, 256)], ids=str
)
def test_head_sizes(case):
    output, gradients = run_case(case, "triton")
    assert_close(output, case.expected, TOLERANCES["output"])
    assert_gradients_close(gradients, case.expected_gradients[1])


def test_padded_head_size():
    made = shrunk(BY_NAME["R3 causal"])
    run = attention(made.inputs, {**dict(made.options), "head_dim_pad": 48}, "triton")
    output, gradients = attention_gradients(run, made.inputs, made.discoverability)
    assert_close(output, made.expected, TOLERANCES["output"])
    assert_gradients_close(gradients, made.expected_gradients[1])


# --- layouts -------------------------------------------------------------------------------------


def packed(tensors):
    """Slices of one tensor (B, S, 3, N, H), as one projection makes them."""
    return torch.stack(list(tensors), dim=2).unbind(2)


def head_major(tensors):
    """Views of tensors (B, N, S, H)."""
    return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]


def every_second(tensors):
    """Features that are no neighbours in memory."""
    return [torch.stack([x, x], dim=-1)[..., 0] for x in tensors]


ARRANGED = case("arranged", sizes={"batch": 2, "tokens": 19}, is_causal=True, **FOURS)


def arranged_results(tensors, cotangent):
    run = attention(ARRANGED.inputs, dict(ARRANGED.options), "triton")
    leaves = [x.detach().requires_grad_() for x in tensors]
    output = run(*leaves, None, 20.0, 0.3)
    return [output.detach(), *torch.autograd.grad(output, leaves, cotangent)]


@functools.cache
def contiguous():
    """Query, key and value of one size, a cotangent, and their results."""
    inputs = ARRANGED.inputs
    arrays = (inputs.query, inputs.key, inputs.key[:, ::-1].copy(), inputs.query)
    *tensors, cotangent = map(torch.tensor, arrays)
    return tensors, cotangent, arranged_results(tensors, cotangent)


@pytest.mark.parametrize("layout", [packed, head_major, every_second])
def test_layouts(layout):
    tensors, cotangent, expected = contiguous()
    arranged, slope = layout(tensors), layout([cotangent] * 3)[0]
    assert not any(x.is_contiguous() for x in (*arranged, slope))
    for one, other in zip(arranged_results(arranged, slope), expected, strict=True):
        assert torch.equal(one, other)


def test_an_expanded_cotangent():
    made = shrunk(BY_NAME["R1 causal"])
    run = attention(made.inputs, dict(made.options), "triton")
    value = torch.tensor(made.inputs.value, requires_grad=True)
    output = run(torch.tensor(made.inputs.query), torch.tensor(made.inputs.key), value, None, 20, 1)
    (expanded,) = torch.autograd.grad(output.sum(), value, retain_graph=True)
    (expected,) = torch.autograd.grad(output, value, torch.ones_like(output))
    assert torch.equal(expanded, expected) and expected.abs().max() > 0.1
