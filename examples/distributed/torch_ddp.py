#!/usr/bin/env python3
"""Data parallel training on the torch backend with `DistributedDataParallel`.

    torchrun --nproc-per-node 2 examples/distributed/torch_ddp.py
    python3 examples/distributed/torch_ddp.py                      # the same on one process

Each process runs its share of every batch, and DDP averages the gradients.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import language_model
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch_training import (
    Part,
    draw_own_dropout,
    finish,
    parse,
    processes,
    train,
)


def main(arguments=None):
    """Trains, prints the losses and saves the weights."""
    options = parse(__doc__, arguments)
    with processes():
        run(options)


def run(options):
    """What each process does."""
    model = language_model.make_model(dropout=options.dropout)
    draw_own_dropout(model)
    module = DistributedDataParallel(Part(model, model.variables))
    optimizer = torch.optim.AdamW(module.parameters(), lr=options.learning_rate)
    train(module, optimizer, options)
    if distributed.get_rank() == 0:
        finish(model, options)


if __name__ == "__main__":
    main()
