"""Callbacks for training."""

import keras

from keras_rwr.statistics import walk_statistics


class RWRStatsCallback(keras.callbacks.Callback):
    """Adds statistics of graphs and walks to the logs of each epoch.

    Callbacks behind it in the list see them beside the losses: `keras.callbacks.CSVLogger` writes
    them into its file, `keras.callbacks.TensorBoard` draws them, and the history holds them. The
    statistics are those of `keras_rwr.statistics.walk_statistics`, one number a layer, with names
    such as `"rwr_0_entropy"`: the prefix, the number of the layer in the order of calls, and the
    name of the statistic.

    Args:
        inputs: What the model is called with: a few short sequences, since matrices of the size of
            their length squared are made for each head and layer.
        prefix: String that the names begin with. Defaults to `"rwr"`.

    Example:

    ```python
    probe = {"token_ids": token_ids[:4], "padding_mask": padding_mask[:4]}
    callbacks = [RWRStatsCallback(probe), keras.callbacks.CSVLogger("losses.csv")]
    model.fit(inputs, targets, callbacks=callbacks)
    ```
    """

    def __init__(self, inputs, prefix="rwr"):
        super().__init__()
        self.inputs = inputs
        self.prefix = prefix

    def on_epoch_end(self, epoch, logs=None):
        if logs is None:
            return
        for number, statistics in enumerate(walk_statistics(self.model, self.inputs)):
            for name, value in statistics.items():
                logs[f"{self.prefix}_{number}_{name}"] = value
