#!/usr/bin/env python3
"""Data or model parallel training on the jax backend with `keras.distribution`.

    python3 examples/distributed/jax_distribution.py --kind data
    python3 examples/distributed/jax_distribution.py --kind model   # heads and hidden units, too

Set the distribution before the model is made. Each device computes the attention of its own batch
entries and heads. Without accelerators, four devices are made of one CPU.
"""

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "jax")
# Nothing but the CPU takes notice of this; it must be set before jax starts.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import keras
import language_model

from keras_rwr.models import RWRGPT2Backbone


def main(arguments=None):
    """Trains, prints the losses and saves the weights."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=("none", "data", "model"), default="model")
    parser.add_argument("--steps", type=int, default=20, help="training steps")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of all devices")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--weights", help="file for the trained weights, *.weights.h5")
    options = parser.parse_args(arguments)
    keras.distribution.set_distribution(make_distribution(options.kind))
    model, losses = train(options.steps, options.batch_size, dropout=options.dropout)
    for step, loss in enumerate(losses):
        print(f"step {step + 1}: loss {loss:.7f}")
    print(f"continuation: {language_model.continue_sequence(model)}")
    if options.weights is not None:
        model.save_weights(options.weights)


def make_distribution(kind):
    """A distribution over all devices: `"data"`, `"model"`, or `None` for `"none"`."""
    devices = keras.distribution.list_devices()
    if kind == "none":
        return None
    if kind == "data":
        return keras.distribution.DataParallel(devices=devices)
    parts = 2 if len(devices) % 2 == 0 else 1
    shape = (len(devices) // parts, parts)
    mesh = keras.distribution.DeviceMesh(shape, ("batch", "model"), devices)
    layout_map = RWRGPT2Backbone.get_layout_map(mesh)
    return keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch")


def train(training_steps, batch_size, **model_options):
    """Trains on one batch.

    Args:
        training_steps: Int.
        batch_size: Int. Sequences of all devices, a multiple of those that divide the batch.
        **model_options: Arguments of `language_model.make_model`.

    Returns:
        Tuple of the model and the list of the steps' losses.
    """
    model = language_model.make_model(**model_options)
    model.compile(
        optimizer=keras.optimizers.AdamW(3e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=None,
    )
    inputs, targets = language_model.make_batch(batch_size)
    history = model.fit(
        inputs, targets, batch_size=batch_size, epochs=training_steps, shuffle=False, verbose=0
    )
    return model, history.history["loss"]


if __name__ == "__main__":
    main()
