"""The kernels as operators of torch, for autograd, `torch.compile` and CUDA graphs."""

import torch

_library = torch.library.Library("keras_rwr", "DEF")


def define(schema, run, make_outputs):
    """Makes an operator of torch, which compilers and `torch.func` take as it is.

    Args:
        schema: String, the operator's name, arguments and results, as torch writes them.
        run: Function that computes the results of tensors on one device, by `run.run`.
        make_outputs: Function of the same arguments that returns tensors of the results' shapes
            and dtypes, whatever they hold.

    Returns:
        The operator.
    """
    name, run = schema.split("(")[0], torch.compiler.disable(run)
    _library.define(schema)
    _library.impl(name, run, "CUDA")
    _library.impl(name, run, "CPU")
    torch.library.register_fake(f"keras_rwr::{name}", make_outputs, lib=_library)
    return getattr(torch.ops.keras_rwr, name).default


def refuse_second_derivative():
    """Raises where a backward pass is to be differentiated itself, with `create_graph=True`."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "The Triton kernels of RWR attention have no second derivative: use "
            '`implementation="portable"`.'
        )
