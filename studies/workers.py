"""Processes that train one model each, and what they write down: losses, checkpoints, memory."""

import csv
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np

from studies.data import UsageError, write_arrays

ROOT = Path(__file__).parents[1]


def start(module, *arguments):
    """Runs a module of this package in a process of its own and returns its exit code."""
    path = os.pathsep.join([os.fspath(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", module, *map(os.fspath, arguments)]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode


def verbosity():
    """Keras's `verbose`: a progress bar on a terminal, else a line an epoch."""
    return 1 if sys.stdout.isatty() else 2


class StopWithParent(keras.callbacks.Callback):
    """Ends this process when the one that started it has ended."""

    def __init__(self):
        super().__init__()
        self.parent = os.getppid()

    def on_train_batch_end(self, batch, logs=None):
        if os.getppid() != self.parent:
            sys.exit("The process that started this one has ended.")


class RunLog(keras.callbacks.Callback):
    """Writes losses and checkpoints after each evaluation, and restores them.

    `keras.callbacks.BackupAndRestore` keeps weights and epoch in two files, without the seeds of
    dropout. Here one file holds all that training continues from and replaces the last one as a
    whole, so that a run killed at any moment goes on exactly as if it had not been.
    """

    FIELDS = (
        "step",
        "tokens",
        "training_loss",
        "validation_loss",
        "learning_rate",
        "timed_tokens",
        "timed_seconds",
        "peak_memory_mb",
    )

    def __init__(self, folder, steps_per_epoch, tokens_per_step, seed):
        super().__init__()
        self.seed = seed
        self.epoch = 0
        self.losses = folder / "losses.csv"
        self.checkpoint = folder / "checkpoint.npz"
        self.steps_per_epoch = steps_per_epoch
        self.tokens_per_step = tokens_per_step
        self.rows = []
        self.started = None  # None until the first batch, which compiles, is over
        self.timed_steps = 0
        self.timed_seconds = 0.0

    def state(self, model):
        """Every variable that training changes, by a name that no earlier model alters."""
        variables = [*model.variables, *model.optimizer.variables]
        return {f"{i:04d}:{variable.name}": variable for i, variable in enumerate(variables)}

    def restore(self, model):
        """Loads the last checkpoint, if there is one, and returns the epochs behind it."""
        if not self.checkpoint.exists():
            return 0
        state = self.state(model)
        with np.load(self.checkpoint) as stored:
            if set(stored) != {*state, "epoch"}:
                raise UsageError(
                    "`run_dir` must hold a checkpoint of the same model. "
                    f"Received: run_dir={self.checkpoint.parent.parent}"
                )
            for name, variable in state.items():
                variable.assign(stored[name])
            epoch = int(stored["epoch"])
        # the losses are written before the checkpoint, so they may be one row ahead
        self.rows = read_losses(self.losses)[:epoch]
        return epoch

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch
        self.timed_steps, self.timed_seconds = 0, 0.0
        if self.started is not None:
            self.started = time.perf_counter()

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 0:
            # torch draws dropout, and each new data iterator, from a state that no variable holds
            keras.utils.set_random_seed(self.seed + self.epoch)

    def on_train_batch_end(self, batch, logs=None):
        if self.started is None:
            float(logs["loss"])  # waits for the device
            self.started = time.perf_counter()
        else:
            self.timed_steps += 1
        if batch + 1 == self.steps_per_epoch:
            float(logs["loss"])
            self.timed_seconds = time.perf_counter() - self.started

    def on_epoch_end(self, epoch, logs=None):
        step = (epoch + 1) * self.steps_per_epoch
        row = {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "training_loss": float(logs["loss"]),
            "validation_loss": float(logs["val_loss"]),
            "learning_rate": float(self.model.optimizer.learning_rate),
            "timed_tokens": self.timed_steps * self.tokens_per_step,
            "timed_seconds": self.timed_seconds,
            "peak_memory_mb": peak_memory_mb(),
        }
        self.rows.append(row)
        write_losses(self.losses, self.rows)
        for name in ("training_loss", "validation_loss"):
            if not math.isfinite(row[name]):
                sys.exit(f"The {name.replace('_', ' ')} at step {step} is {row[name]}.")
        state = self.state(self.model)
        arrays = {name: variable.numpy() for name, variable in state.items()}
        write_arrays(self.checkpoint, {**arrays, "epoch": np.array(epoch + 1)})


def write_losses(path, rows):
    """Writes the losses CSV so that it is never seen half written."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, RunLog.FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def read_losses(path):
    """The rows of a losses CSV, as numbers."""
    with open(path, newline="", encoding="utf-8") as file:
        return [
            {
                name: int(value) if name in ("step", "tokens", "timed_tokens") else float(value)
                for name, value in row.items()
            }
            for row in csv.DictReader(file)
        ]


def read_results(path):
    """The lines of `results.jsonl`: dicts of a run and what was measured."""
    return [json.loads(x) for x in path.read_text("utf-8").splitlines()] if path.exists() else []


def peak_device_memory_mb():
    """Most memory of an accelerator that this process has held at once, in MiB; None without one.

    On torch and jax that of their allocators, which keep more from the driver.
    """
    backend = keras.backend.backend()
    if backend == "torch":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
    if backend == "jax":
        import jax

        statistics = jax.devices()[0].memory_stats()
        return None if statistics is None else statistics["peak_bytes_in_use"] / 2**20
    import tensorflow as tf

    if not tf.config.list_logical_devices("GPU"):
        return None
    return tf.config.experimental.get_memory_info("GPU:0")["peak"] / 2**20


def peak_memory_mb():
    """Highest resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would count the parent's memory, which exec inherits
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    import resource  # not everywhere

    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
