"""Gradient checkpointing of decoder blocks, as `keras.RematScope` asks for it.

Keras passes every argument of a layer's call to the framework, which makes tensors of flags and
fails, and a second run would draw other dropout than the first. This passes tensors only, and the
same random seeds to both runs.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import ops, tree
from keras.src.backend.common.remat import get_current_remat_mode


def checkpoints(layer: keras.layers.Layer) -> bool:
    """Whether the scope in which `layer` was made asks for checkpointing it as a whole."""
    mode = layer._remat_mode
    if mode is None:
        return False
    return mode.mode == "full" or (mode.mode == "list_of_layers" and layer.name in mode.layer_names)


@contextlib.contextmanager
def blocks_only() -> Iterator[Any]:
    """A scope whose layers are not checkpointed in mode `"full"`: only decoder blocks are.

    Yields:
        The mode outside, for the blocks.
    """
    mode = get_current_remat_mode()
    is_full = mode is not None and mode.mode == "full"
    with keras.RematScope(None) if is_full else contextlib.nullcontext():
        yield mode


def checkpointed(layer: keras.layers.Layer, call: Callable) -> Callable:
    """Makes a call that keeps its inputs only, and runs again in the backward pass.

    Args:
        layer: A built layer that draws from each of its random generators once a call.
        call: Its `call`.

    Returns:
        A function with the arguments of `call`.
    """

    @functools.wraps(call)
    def checkpointed_call(*args: Any, **kwargs: Any) -> Any:
        leaves = tree.flatten((args, kwargs))
        places = [place for place, leaf in enumerate(leaves) if ops.is_tensor(leaf)]
        weights = {id(weight) for weight in layer.weights}
        seeds = [variable for variable in layer.variables if id(variable) not in weights]
        state = [(seed, ops.copy(seed.value)) for seed in seeds]
        if keras.backend.backend() == "jax":
            # A scope around this one holds the values there, and the inner one hides it.
            state += [(weight, weight.value) for weight in layer.weights]

        def run(*tensors: Any) -> Any:
            inputs = list(leaves)
            for place, tensor in zip(places, tensors, strict=True):
                inputs[place] = tensor
            args_, kwargs_ = tree.pack_sequence_as((args, kwargs), inputs)
            with keras.StatelessScope(state_mapping=state):
                return call(*args_, **kwargs_)

        outputs = keras.remat(run)(*[leaves[place] for place in places])
        for seed in seeds:
            # As `keras.random.SeedGenerator.next` does.
            seed.assign(seed.value + ops.convert_to_tensor([0, 1], dtype=seed.dtype))
        return outputs

    return checkpointed_call
