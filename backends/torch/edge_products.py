"""Products of adjoint states and states, the gradients of edges.

With the states of the adjoint walk and those of the walk, the gradient of an edge is one product of
concatenated factors, `dP_ij = (1 - alpha) sum_m G^m_i Z^(m-1)_j`, and is needed on edges only.
"""

import triton
import triton.language as tl


@triton.jit
def load_adjoints(
    adjoint_ptr,
    rows,
    inside,
    step_stride,
    first_step,
    features,
    WALKED: tl.constexpr,
    STATE: tl.constexpr,
    STEPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """`[G^(m+1), G^(m+2), ...]` of some rows for a group of steps from m = first_step on."""
    column = tl.arange(0, GROUP * STATE)
    step, feature = first_step + column // STATE, features + column % STATE
    pointers = rows.to(tl.int64)[:, None] * WALKED + ((step + 1) * step_stride + feature)[None, :]
    wanted = (step < STEPS) & (feature < WALKED)
    return tl.load(adjoint_ptr + pointers, mask=inside[:, None] & wanted[None, :], other=0.0)


@triton.jit
def load_states(
    start_ptr,
    states_ptr,
    rows,
    inside,
    start_row,
    step_stride,
    first_step,
    features,
    WALKED: tl.constexpr,
    STATE: tl.constexpr,
    STEPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """`[Z^m, Z^(m+1), ...]` of some rows; states_ptr is at Z^1, start_ptr at Z^0."""
    column = tl.arange(0, GROUP * STATE)
    step, feature = first_step + column // STATE, features + column % STATE
    rows = rows.to(tl.int64)[:, None]
    later = states_ptr + rows * WALKED + ((step - 1) * step_stride + feature)[None, :]
    pointers = tl.where(
        (step == 0)[None, :], start_ptr + rows * start_row + feature[None, :], later
    )
    wanted = (step < STEPS) & (feature < WALKED)
    return tl.load(pointers, mask=inside[:, None] & wanted[None, :], other=0.0)


@triton.jit
def edge_products(
    total,
    adjoint_ptr,
    adjoint_rows,
    adjoint_inside,
    start_ptr,
    states_ptr,
    state_rows,
    state_inside,
    start_row,
    step_stride,
    WALKED: tl.constexpr,
    STATE: tl.constexpr,
    STEPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Adds `sum_m G^m_i Z^(m-1)_j`."""
    for first_step in tl.static_range(0, STEPS, GROUP):
        for features in tl.static_range(0, WALKED, STATE):
            adjoints = load_adjoints(
                adjoint_ptr,
                adjoint_rows,
                adjoint_inside,
                step_stride,
                first_step,
                features,
                WALKED,
                STATE,
                STEPS,
                GROUP,
            )
            states = load_states(
                start_ptr,
                states_ptr,
                state_rows,
                state_inside,
                start_row,
                step_stride,
                first_step,
                features,
                WALKED,
                STATE,
                STEPS,
                GROUP,
            )
            total = tl.dot(adjoints, tl.trans(states), total, input_precision="ieee")
    return total
