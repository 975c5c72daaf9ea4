#!/usr/bin/env python3
"""Data parallel training on the tensorflow backend with `tf.distribute.MirroredStrategy`.

    python3 examples/distributed/tensorflow_mirrored.py             # two devices made of one CPU
    python3 examples/distributed/tensorflow_mirrored.py --gpus      # all GPUs of the machine

Make and compile the model in the strategy's scope; `fit` divides each batch over the devices.
"""

import argparse
import contextlib
import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import language_model
import tensorflow as tf


def main(arguments=None):
    """Trains, prints the losses and saves the weights."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="training steps")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of all devices")
    parser.add_argument("--gpus", action="store_true", help="use the machine's GPUs")
    parser.add_argument("--weights", help="file for the trained weights, *.weights.h5")
    options = parser.parse_args(arguments)
    devices = None if options.gpus else split_cpu(2)
    model, losses = train(
        tf.distribute.MirroredStrategy(devices), options.steps, options.batch_size
    )
    for step, loss in enumerate(losses):
        print(f"step {step + 1}: loss {loss:.7f}")
    print(f"continuation: {language_model.continue_sequence(model)}")
    if options.weights is not None:
        model.save_weights(options.weights)


def split_cpu(number):
    """Makes several logical devices of the CPU; only before TensorFlow has used it.

    Returns:
        List of their names.
    """
    cpu = tf.config.list_physical_devices("CPU")[0]
    parts = [tf.config.LogicalDeviceConfiguration()] * number
    tf.config.set_logical_device_configuration(cpu, parts)
    return [f"CPU:{i}" for i in range(number)]


def train(strategy, training_steps, batch_size, **model_options):
    """Trains on one batch.

    Args:
        strategy: `tf.distribute.Strategy`, or `None` for one device.
        training_steps: Int.
        batch_size: Int. Sequences of all devices, which divide them.
        **model_options: Arguments of `language_model.make_model`.

    Returns:
        Tuple of the model and the list of the steps' losses.
    """
    with contextlib.nullcontext() if strategy is None else strategy.scope():
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
