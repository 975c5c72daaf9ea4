"""Training of one ablation step, `python -m studies.training RUN_FOLDER STEP SEED`."""

import json
import math
import os
import sys
from pathlib import Path

import keras
import numpy as np

from keras_rwr import ablation
from keras_rwr.statistics import walk_statistics
from studies.arguments import base
from studies.data import (
    as_batch,
    batch_rows,
    cut_blocks,
    prepare_tokens,
    write_arrays,
    write_json,
)
from studies.workers import (
    RunLog,
    StopWithParent,
    peak_device_memory_mb,
    peak_memory_mb,
    verbosity,
)

POSITION_BINS = 32  # parts of the context whose losses are told apart
PROBE_SEQUENCES = 4  # of the validation text, for the graph statistics
# what AdamW's weight decay leaves alone: biases, layer norms, a head's own few numbers
NO_DECAY = ["bias", "gamma", "beta", "scale", "concentration", "lens_strength", "discoverability"]
NO_DECAY += ["hop_weights", "graph_convolution"]


class Batches(keras.utils.PyDataset):
    """Endless training batches; number n of them is that of training step `first` + n."""

    def __init__(self, blocks, batch_size, seed, first):
        super().__init__()
        self.blocks, self.batch_size, self.seed, self.first = blocks, batch_size, seed, first

    @property
    def num_batches(self):
        return None

    def __getitem__(self, index):
        step = self.first + index
        return as_batch(self.blocks[batch_rows(len(self.blocks), self.batch_size, step, self.seed)])


def build_backbone(step, arguments, overrides=None):
    """The backbone of an ablation step at the sizes of this run."""
    return ablation.build_backbone(
        base(step),
        overrides=overrides,
        vocabulary_size=arguments["vocabulary_size"],
        num_layers=arguments["layers"],
        num_heads=arguments["heads"],
        hidden_dim=arguments["width"],
        intermediate_dim=4 * arguments["width"],
        dropout=arguments["dropout"],
        max_sequence_length=arguments["context"],
        dtype=arguments["dtype"],
    )


def prepare(run_dir, arguments):
    """Makes what all steps share: vocabulary and tokens."""
    folder = run_dir / "data"
    folder.mkdir(exist_ok=True)
    train_tokens = arguments["training_steps"] * arguments["batch_size"] * arguments["context"]
    tokens = prepare_tokens(folder, arguments, train_tokens)
    for name, values in tokens.items():
        cut_blocks(values, arguments["context"], name)


def initial_weights(folder, arguments, seed):
    """Path of R0's initial weights, which the first step to be trained makes."""
    path = folder / f"initial-{seed}.npz"
    if not path.exists():
        keras.utils.set_random_seed(seed)
        weights = build_backbone("R0", arguments).weights
        write_arrays(path, {weight.path: weight.numpy() for weight in weights})
    return path


def load_initial(backbone, path):
    """Copies R0's initial weights by variable path; RWR's own weights keep their initial values."""
    with np.load(path) as stored:
        weights = {weight.path: weight for weight in backbone.weights}
        missing = set(stored) - set(weights)
        if missing:
            raise ValueError(
                f"`backbone` must have the variables of GPT-2. Received: none at {sorted(missing)}"
            )
        for name in stored:
            weights[name].assign(stored[name])


def make_optimizer(arguments):
    """AdamW with warm-up and cosine decay."""
    peak, warmup = arguments["learning_rate"], arguments["warmup_steps"]
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=peak / max(warmup, 1),
        warmup_target=peak,
        warmup_steps=warmup,
        decay_steps=max(arguments["training_steps"] - warmup, 1),
        alpha=0.1,
    )
    optimizer = keras.optimizers.AdamW(
        schedule, weight_decay=arguments["weight_decay"], beta_2=0.98, global_clipnorm=1.0
    )
    optimizer.exclude_from_weight_decay(var_names=NO_DECAY)
    return optimizer


def compile_model(backbone, arguments):
    """The language model of a backbone, ready to train."""
    logits = backbone.token_embedding(backbone.output, reverse=True)
    model = keras.Model(backbone.input, logits)
    optimizer = make_optimizer(arguments)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss)
    optimizer.build(model.trainable_variables)
    return model


def folder_of(run_dir, step, seed):
    """Where a training writes to."""
    return run_dir / f"{step.replace(':', '-')}-{seed}"


def train(run_dir, step, seed, config, verbose="auto", is_worker=False):
    """Trains one ablation step, from its last checkpoint if there is one.

    Args:
        run_dir: path. The run folder, with what `prepare` made.
        step: str. A key of `keras_rwr.ablation.STEPS`, or one with options of its own.
        seed: int. One of the run's.
        config: dict. What `config.json` holds.
        verbose: Keras's. "auto" is a progress bar on a terminal, else a line an evaluation.
        is_worker: bool. Whether to stop when the process that started this one ends.

    Returns:
        What was measured, a dict that is also written to `result.json`.
    """
    arguments = config["arguments"]
    options = ablation.step_options(base(step), config["overrides"][step])
    folder = folder_of(run_dir, step, seed)
    folder.mkdir(exist_ok=True)
    context, batch_size = arguments["context"], arguments["batch_size"]
    with np.load(run_dir / "data" / "tokens.npz") as stored:
        training = cut_blocks(stored["training"], context, "training")
        validation = cut_blocks(stored["validation"], context, "validation")
    if len(validation) > batch_size:  # whole batches, so that one shape is compiled
        validation = validation[: len(validation) // batch_size * batch_size]

    initial = initial_weights(run_dir / "data", arguments, seed)
    keras.utils.set_random_seed(seed)
    backbone = build_backbone(step, arguments, config["overrides"][step])
    load_initial(backbone, initial)
    model = compile_model(backbone, arguments)
    steps_per_epoch = arguments["evaluate_every"]
    log = RunLog(folder, steps_per_epoch, batch_size * context, seed)
    callbacks = [log, StopWithParent()] if is_worker else [log]
    epochs_done = log.restore(model)
    memory_before = peak_memory_mb()
    model.fit(
        Batches(training, batch_size, seed, epochs_done * steps_per_epoch),
        steps_per_epoch=steps_per_epoch,
        initial_epoch=epochs_done,
        epochs=arguments["training_steps"] // steps_per_epoch,
        validation_data=as_batch(validation),
        validation_batch_size=batch_size,
        shuffle=False,
        callbacks=callbacks,
        verbose=verbosity() if verbose == "auto" else verbose,
    )

    device_memory = peak_device_memory_mb()  # of training, not of the statistics below
    positions = losses_by_position(model, validation, batch_size)
    layers = None
    if options is not None and options.get("steps") != 0:
        probe, _ = as_batch(validation[:PROBE_SEQUENCES])
        layers = walk_statistics(backbone, probe)
    seconds = sum(row["timed_seconds"] for row in log.rows)
    timed_tokens = sum(row["timed_tokens"] for row in log.rows)
    last = log.rows[-1]
    result = {
        "step": step,
        "seed": seed,
        "description": ablation.STEPS[base(step)].description,
        "options": options,
        "parameters": model.count_params(),
        "training_loss": last["training_loss"],
        "validation_loss": last["validation_loss"],
        "perplexity": math.exp(last["validation_loss"]),
        "tokens_per_second": timed_tokens / seconds if timed_tokens else None,
        "peak_memory_mb": max(row["peak_memory_mb"] for row in log.rows),
        "memory_before_training_mb": memory_before,
        "device_memory_mb": device_memory,
        "losses_by_position": positions,
        "statistics": None if layers is None else mean_statistics(layers),
        "statistics_by_layer": layers,
    }
    weights = folder / "backbone.weights.h5"
    temporary = folder / "unfinished.weights.h5"
    backbone.save_weights(temporary)
    os.replace(temporary, weights)
    write_json(folder / "result.json", result)
    return result


class PositionLoss(keras.metrics.Metric):
    """Mean cross-entropy at each position of the context, in nats."""

    def __init__(self, context):
        super().__init__(name="position_loss")
        self.total = self.add_weight(name="total", shape=(context,), initializer="zeros")
        self.count = self.add_weight(name="count", initializer="zeros")

    def update_state(self, y_true, y_pred, sample_weight=None):
        y_pred = keras.ops.cast(y_pred, "float32")
        losses = keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)
        self.total.assign_add(keras.ops.sum(losses, axis=0))
        self.count.assign_add(keras.ops.cast(keras.ops.shape(losses)[0], "float32"))

    def result(self):
        return self.total / keras.ops.maximum(self.count, 1.0)


def losses_by_position(model, validation, batch_size):
    """Mean loss of the validation sequences in `POSITION_BINS` equal parts of the context.

    Returns:
        A list of dicts of `first`, the first position of a part, and its `loss`.
    """
    context = validation.shape[1] - 1
    evaluated = keras.Model(model.input, model.output)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    evaluated.compile(loss=loss, metrics=[PositionLoss(context)])
    found = evaluated.evaluate(
        *as_batch(validation), batch_size=batch_size, verbose=0, return_dict=True
    )
    losses = np.asarray(found["position_loss"], dtype="float64")
    starts = np.unique(np.linspace(0, context, POSITION_BINS, endpoint=False).astype(int))
    parts = np.split(losses, starts[1:])
    return [
        {"first": int(first), "loss": float(part.mean())}
        for first, part in zip(starts, parts, strict=True)
    ]


def mean_statistics(layers):
    """Mean over layers of each graph statistic."""
    return {name: float(np.mean([layer[name] for layer in layers])) for name in layers[0]}


def is_out_of_memory(error):
    """Whether an exception says that an accelerator has too little memory, on any backend."""
    names = ("OutOfMemoryError", "ResourceExhaustedError")
    text = str(error).lower()
    return type(error).__name__ in names or "resource_exhausted" in text or "out of memory" in text


def main(run_folder, step, seed):
    """Trains one step of a run folder, as a process of its own."""
    config = json.loads((run_folder / "config.json").read_text("utf-8"))
    try:
        train(run_folder, step, seed, config, is_worker=True)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        sizes = ", ".join(f"{key}={config['arguments'][key]}" for key in ("batch_size", "context"))
        sys.exit(
            f"{step} needs more memory than there is: take a smaller --batch-size or --context. "
            f"Received: {sizes} ({str(error).splitlines()[0]})"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
