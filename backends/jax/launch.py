"""Runs a kernel on arrays, and how arrays are divided among its programs.

Arrays of tokens have the shape `(B N, S, F)` or, as a call gets and returns them, `(B, S, N, F)`.
Programs form a grid whose first axis are batch entries and heads. The second one are tiles, or key
blocks, and the third one, if any, parts of a state.
"""

import jax
from jax.experimental import pallas as pl


def run(kernel, plan, grid, inputs, outputs, warps=4, stages=2):
    """Runs a kernel.

    Args:
        kernel: Function `kernel(plan, refs, out)`, see `tiles`.
        plan: `Plan`.
        grid: Tuple of ints, behind batch entries and heads.
        inputs: Dict from a name to a pair of an array and the `pl.BlockSpec` of what a program
            sees of it, or to `None`. Numbers that say where others are come first, as "starts".
        outputs: Dict from a name to a `jax.ShapeDtypeStruct` and a `pl.BlockSpec`, or to `None`.
        warps: Int. Warps of a program on a GPU.
        stages: Int. Loads under way at a time on a GPU.

    Returns:
        Dict from the names of the outputs to arrays.
    """
    given = {name: x for name, x in inputs.items() if x is not None}
    wanted = {name: x for name, x in outputs.items() if x is not None}

    def body(*refs):
        read, written = refs[: len(given)], refs[len(given) :]
        kernel(
            plan,
            dict.fromkeys(inputs) | dict(zip(given, read, strict=True)),
            dict.fromkeys(outputs) | dict(zip(wanted, written, strict=True)),
        )

    body.__name__ = kernel.__name__
    arrays, in_specs = zip(*given.values(), strict=True)
    shapes, out_specs = zip(*wanted.values(), strict=True)
    results = pl.pallas_call(
        body,
        out_shape=shapes,
        name=kernel.__name__,
        **_placing(plan, (plan.batch_heads, *grid), list(given), in_specs, out_specs),
        **_options(plan, warps, stages),
    )(*arrays)
    return dict(zip(wanted, results, strict=True))


def _placing(plan, grid, names, in_specs, out_specs):
    if plan.target == "tpu" and "starts" in names:
        from jax.experimental.pallas import tpu

        # They come first, and are read before the programs start.
        return {"grid_spec": tpu.PrefetchScalarGridSpec(1, grid, in_specs[1:], out_specs)}
    return {"grid": grid, "in_specs": in_specs, "out_specs": out_specs}


def _options(plan, warps, stages):
    if plan.target == "interpreter":
        return {"interpret": True}
    if plan.target == "tpu":
        from jax.experimental.pallas import tpu

        return {"compiler_params": tpu.CompilerParams()}
    from jax.experimental.pallas import triton

    return {"compiler_params": triton.CompilerParams(num_warps=warps, num_stages=stages)}


def whole(x):
    """All of a head's part of an array `(B N, ...)`, or `(B, S, N, F)`."""
    if len(x.shape) == 4:
        return _of_tokens(x, x.shape[1], x.shape[3], lambda *_: (0, 0))
    zeros = (0,) * (len(x.shape) - 1)
    return pl.BlockSpec((None, *x.shape[1:]), lambda head, *_: (head, *zeros))


def everything(x):
    """All of an array, of all heads."""
    return pl.BlockSpec(x.shape, lambda *_: (0,) * len(x.shape))


def one(x):
    """A tile's or key block's part of an array `(B N, tiles, ...)`."""
    zeros = (0,) * (len(x.shape) - 2)
    return pl.BlockSpec((None, None, *x.shape[2:]), lambda head, tile, *_: (head, tile, *zeros))


def rows(x, tile, tiles=None):
    """A tile of an array of tokens; with the number of tiles, counted from the last one."""
    last = None if tiles is None else tiles - 1
    return _of_tokens(
        x, tile, x.shape[-1], lambda tile, *_: (tile if last is None else last - tile, 0)
    )


def rows_of_part(x, tile, values):
    """A tile of one part of an array of tokens with `parts * values` features."""
    return _of_tokens(x, tile, values, lambda tile, part, *_: (tile, part))


def part_of(x, values):
    """One part of all of a head's tokens with `parts * values` features."""
    size = x.shape[1]
    return _of_tokens(x, size, values, lambda tile, part, *_: (0, part))


def _of_tokens(x, size, features, place):
    """Some tokens and features of a head; `place` tells which from a program's numbers."""
    if len(x.shape) == 3:
        return pl.BlockSpec((None, size, features), lambda head, *ids: (head, *place(*ids)))
    heads = x.shape[2]

    def index(head, *ids):
        token, feature = place(*ids)
        return jax.lax.div(head, heads), token, jax.lax.rem(head, heads), feature

    return pl.BlockSpec((None, size, None, features), index)
