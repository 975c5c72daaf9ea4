#!/usr/bin/env python3
"""Fully sharded training on the torch backend with FSDP2's `fully_shard`.

    torchrun --nproc-per-node 2 examples/distributed/torch_fsdp2.py
    python3 examples/distributed/torch_fsdp2.py                    # the same on one process

Each process keeps its share of every weight, gradient and optimizer state. The weights of one
transformer layer at a time are gathered for its computation, those of the embeddings once a step.

`fully_shard` replaces a module's parameters, now by whole ones, now by a process's shards, in hooks
before and after a call. Keras variables would keep the first parameters, and calls from layer to
layer run no hooks. So a `Part` is called where each transformer layer's `call` was, and points the
layer's variables at what its parameters are at that time.
"""

import contextlib
import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import language_model
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch_training import (
    Part,
    draw_own_dropout,
    finish,
    parse,
    processes,
    train,
)


def shard(model, mesh):
    """Shards a task such as `RWRGPT2CausalLM`, in place, by transformer layers.

    Args:
        model: Built Keras model with a `backbone` that has `transformer_layers`.
        mesh: `torch.distributed.DeviceMesh` of one dimension.

    Returns:
        The model as a module of torch, to call, and whose parameters an optimizer of torch takes.
        Variables of `model` have no values outside of its calls, except in `gathered`.
    """
    layers = model.backbone.transformer_layers
    parts = [fully_shard(Part(layer.call, layer.variables), mesh=mesh) for layer in layers]
    module = fully_shard(Part(model, model.variables, parts), mesh=mesh)
    _attach(model, module)
    # Keras's lists of parameters for torch would keep the whole ones alive.
    for layer in (model, model.backbone, *model._flatten_layers()):
        vars(layer).pop("_torch_params", None)
        layer._modules.pop("_torch_params", None)
    return module


def _attach(model, module):
    for layer, part in zip(model.backbone.transformer_layers, module.parts, strict=True):
        layer.call = part.__call__
    for part in (*module.parts, module):
        part.point()


@contextlib.contextmanager
def gathered(model, module):
    """Makes `model` an ordinary Keras model for a while: to save, to generate, to evaluate.

    Args:
        model: Keras model.
        module: What `shard` made of it. Every process must enter, and holds all weights meanwhile.
    """
    for layer, part in zip(model.backbone.transformer_layers, module.parts, strict=True):
        layer.call = part.function[0]
    for part in (*module.parts, module):
        part.reshard()
        part.point()
        for variable in part.variables:
            variable._value = variable._value.detach().full_tensor()
    try:
        yield
    finally:
        _attach(model, module)


def main(arguments=None):
    """Trains, prints the losses and saves the weights."""
    options = parse(__doc__, arguments)
    with processes():
        run(options)


def run(options):
    """What each process does."""
    rank = distributed.get_rank()
    model = language_model.make_model(dropout=options.dropout)
    draw_own_dropout(model)
    number = model.count_params()
    module = shard(model, init_device_mesh("cpu", (distributed.get_world_size(),)))
    held = sum(x.to_local().numel() for x in module.parameters())
    print(f"process {rank} holds {held} of {number} weights", flush=True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=options.learning_rate)
    train(module, optimizer, options)
    with gathered(model, module):
        if rank == 0:
            finish(model, options)


if __name__ == "__main__":
    main()
