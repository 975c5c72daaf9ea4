"""What the torch scripts share: Keras layers as modules of torch, processes and a training step."""

import argparse
import contextlib
import gc
import os

import keras
import language_model
import torch
from torch import distributed


class Part(torch.nn.Module):
    """The variables and the call of a Keras model or layer as a module of torch.

    KerasHub's models are `torch.nn.Module`s without parameters, and calls between Keras layers run
    none of torch's hooks. This module has the parameters and is called as torch expects.

    Args:
        call: Function, the model, or the layer's `call`.
        variables: List of Keras variables that it uses.
        parts: `Part`s of layers within it. Their variables are theirs alone.
    """

    def __init__(self, call, variables, parts=()):
        super().__init__()
        self.parts = torch.nn.ModuleList(parts)
        # A list keeps the Keras model from becoming a module of this one.
        self.function = [call]
        taken = {id(variable) for part in parts for variable in part.variables}
        # Seeds of dropout are integers and belong to each process.
        self.variables = [
            variable
            for variable in variables
            if id(variable) not in taken and variable.value.is_floating_point()
        ]
        self.values = torch.nn.ParameterList(variable.value for variable in self.variables)

    def forward(self, *args, **kwargs):
        self.point()
        return self.function[0](*args, **kwargs)

    def point(self):
        """Points the Keras variables at what the parameters are now: FSDP2 replaces them."""
        for variable, value in zip(self.variables, self.values, strict=True):
            variable._value = value


def parse(description, arguments):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="training steps")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of all processes")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--weights", help="file for the trained weights, *.weights.h5")
    options = parser.parse_args(arguments)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if options.batch_size % processes:
        parser.error(
            f"--batch-size must be a multiple of the {processes} processes. "
            f"Received: --batch-size {options.batch_size}"
        )
    return options


@contextlib.contextmanager
def processes():
    """Joins the processes that torchrun started, or starts a group of one, on CPUs.

    With GPUs: `torch.cuda.set_device(local_rank)`, backend "nccl" and no `keras.device`.
    """
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    distributed.init_process_group("gloo")
    with keras.device("cpu"):
        yield
    # What DDP and FSDP2 keep alive in cycles must not outlive the group.
    gc.collect()
    distributed.destroy_process_group()


def draw_own_dropout(model):
    """Moves the seeds of dropout, equal until then, so that each process has masks of its own."""
    for variable in model.non_trainable_variables:
        if variable.name == "seed_generator_state":
            variable.assign(variable.value + distributed.get_rank())


def train(module, optimizer, options):
    """Trains, and prints the loss of each step."""
    inputs, targets = language_model.make_batch(options.batch_size)
    mine = slice(distributed.get_rank(), None, distributed.get_world_size())
    inputs = {name: torch.as_tensor(x[mine]) for name, x in inputs.items()}
    targets = torch.as_tensor(targets[mine]).long()
    for step in range(options.steps):
        logits = module(inputs, training=True)  # (B, S, vocabulary_size)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # Shares of one size: the mean of the processes' means is that of the batch.
        total = loss.detach().clone()
        distributed.all_reduce(total)
        if distributed.get_rank() == 0:
            print(f"step {step + 1}: loss {total / distributed.get_world_size():.7f}", flush=True)


def finish(model, options):
    """Continues a sequence and saves the weights, in one process."""
    print(f"continuation: {language_model.continue_sequence(model)}", flush=True)
    if options.weights is not None:
        model.save_weights(options.weights)
