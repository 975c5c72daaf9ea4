"""The kernels as operators of torch, for autograd, `torch.compile` and CUDA graphs.

Triton and the kernels are imported when an operator first runs, so that neither a compiler's trace
nor a machine without Triton meets that import.
"""

import contextlib

import torch

from keras_rwr.backends.torch import plan

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor concentration, "
    "Tensor lens_strength, Tensor? padding_mask, Tensor? neighbors, Tensor? seed"
)
# The fields of `plan.Options`.
_OPTIONS = (
    "float alpha, int steps, int neighbor_block, int window, float? cut, bool exponential, "
    "bool reversible, float reciprocal_beta, bool causal, float dropout, int? block_size, "
    "int? head_dim_pad"
)
_INPUT_COUNT = 9


def _tensors(count):
    return ", ".join(["Tensor"] * count)


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


# The fields of `plan.Saved`, the output first; without `keep` the others are of no use.
_library.define(f"forward({_INPUTS}, bool keep, {_OPTIONS}) -> ({_tensors(10)})")
# Gradients of query, key, value, bias, concentration and lens strength.
_library.define(
    f"backward({_INPUTS}, Tensor[] saved, Tensor cotangent, {_OPTIONS}) -> ({_tensors(6)})"
)
_library.define(
    "select_neighbors(Tensor query, Tensor key, Tensor? padding_mask, int slots, int block, "
    "int window, bool causal, int? block_size) -> Tensor"
)


def rwr_attention(inputs, options):
    """RWR attention, differentiable.

    Args:
        inputs: The fields of `plan.Inputs`.
        options: The fields of `plan.Options`.

    Returns:
        Tensor of shape `(B, S, N, V)`.
    """
    differentiable = [x for x in inputs[:6] if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in differentiable):
        return _Attention.apply(*inputs, *options)
    return torch.ops.keras_rwr.forward(*inputs, False, *options)[0]


def select_neighbors(query, key, padding_mask, slots, block, window, causal, block_size):
    """Key blocks of each query, int32 `(B, N, S, slots)`; see `selection.select_neighbors`."""
    return torch.ops.keras_rwr.select_neighbors(
        query.detach(), key.detach(), padding_mask, slots, block, window, causal, block_size
    )


def refuse_second_derivative():
    """Raises where a backward pass is to be differentiated itself, with `create_graph=True`."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "The Triton kernels of RWR attention have no second derivative: use "
            '`implementation="portable"`.'
        )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        inputs, options = arguments[:_INPUT_COUNT], arguments[_INPUT_COUNT:]
        saved = torch.ops.keras_rwr.forward(*inputs, True, *options)
        ctx.present = [x is not None for x in inputs]
        ctx.options = options
        ctx.save_for_backward(*[x for x in inputs if x is not None], *saved)
        return saved[0]

    @staticmethod
    def backward(ctx, cotangent):
        refuse_second_derivative()
        tensors = list(ctx.saved_tensors)
        inputs = [tensors.pop(0) if present else None for present in ctx.present]
        gradients = torch.ops.keras_rwr.backward(*inputs, tensors, cotangent, *ctx.options)
        wanted = [
            gradient if present and needed else None
            for gradient, present, needed in zip(
                gradients, ctx.present, ctx.needs_input_grad, strict=False
            )
        ]
        return (*wanted, *[None] * (_INPUT_COUNT - 6 + len(ctx.options)))


def _forward(*arguments):
    from keras_rwr.backends.torch import forward

    inputs, keep, options = _split(arguments)
    with _on_device_of(inputs[0]):
        saved = forward.forward(plan.Inputs(*map(_rows, inputs)), plan.Options(*options), keep)
    return tuple(_nothing(inputs[0]) if x is None else x for x in saved)


def _backward(*arguments):
    from keras_rwr.backends.torch import backward

    inputs = arguments[:_INPUT_COUNT]
    saved, cotangent, *options = arguments[_INPUT_COUNT:]
    with _on_device_of(inputs[0]):
        gradients = backward.backward(
            plan.Inputs(*map(_rows, inputs)),
            plan.Options(*options),
            plan.Saved(*[x if x.numel() else None for x in saved]),
            _rows(cotangent.to(inputs[0].dtype)),
        )
    return tuple(_nothing(inputs[0]) if x is None else x for x in gradients)


def _select(query, key, padding_mask, slots, block, window, causal, block_size):
    from keras_rwr.backends.torch import selection

    with _on_device_of(query):
        return selection.select_neighbors(
            _rows(query), _rows(key), padding_mask, slots, block, window, causal, block_size
        )


def _forward_shapes(*arguments):
    inputs, keep, options = _split(arguments)
    saved = plan.Plan(plan.Inputs(*inputs), plan.Options(*options)).allocate(keep)
    return tuple(_nothing(inputs[0]) if x is None else x for x in saved)


def _backward_shapes(*arguments):
    query, key, value, bias, concentration, lens_strength, *_ = arguments
    return (
        query.new_empty(query.shape),
        query.new_empty(key.shape),
        query.new_empty(value.shape),
        _nothing(query) if bias is None else torch.empty_like(bias),
        torch.empty_like(concentration),
        torch.empty_like(lens_strength),
    )


def _select_shapes(query, key, padding_mask, slots, block, window, causal, block_size):
    batch, size, heads, _ = query.shape
    return query.new_empty((batch, heads, size, slots), dtype=torch.int32)


for _name, _run, _shapes in (
    ("forward", _forward, _forward_shapes),
    ("backward", _backward, _backward_shapes),
    ("select_neighbors", _select, _select_shapes),
):
    _run = torch.compiler.disable(_run)
    _library.impl(_name, _run, "CUDA")
    _library.impl(_name, _run, "CPU")
    torch.library.register_fake(f"keras_rwr::{_name}", _shapes, lib=_library)


def _split(arguments):
    """Inputs, `keep` and options of a call of `forward`."""
    return arguments[:_INPUT_COUNT], arguments[_INPUT_COUNT], arguments[_INPUT_COUNT + 1 :]


def _rows(x):
    """The tensor with its last axis contiguous, as the kernels load it."""
    return x if x is None or x.stride(-1) == 1 or x.dim() == 0 else x.contiguous()


def _nothing(x):
    """What stands for None among an operator's results."""
    return x.new_empty((0,))


def _on_device_of(x):
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
