"""Tensors as torch lays them out in memory, and memory that nobody wrote."""

import functools

import pytest
import torch
from helpers import FOURS, attention, case
from test_cases import BY_NAME, shrunk


def test_memory_is_poisoned():
    assert torch.empty(3).isnan().all()
    assert torch.ones(3).new_empty(5).isnan().all()
    assert (torch.empty_like(torch.ones(3, dtype=torch.int32)) == 2**31 - 1).all()


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
    output = run(*leaves)
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
    output = run(torch.tensor(made.inputs.query), torch.tensor(made.inputs.key), value)
    (expanded,) = torch.autograd.grad(output.sum(), value, retain_graph=True)
    (expected,) = torch.autograd.grad(output, value, torch.ones_like(output))
    assert torch.equal(expanded, expected) and expected.abs().max() > 0.1
