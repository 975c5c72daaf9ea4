"""RWR attention for Keras 3: windowed attention plus a random walk with restart."""

import importlib
from typing import Any

from keras_rwr import ablation, callbacks, data, graph, layers, ops, options, statistics
from keras_rwr._dispatch import explain
from keras_rwr.layers import RWRAttention, RWRGroupedQueryAttention
from keras_rwr.options import Options

__all__ = [
    "Options",
    "RWRAttention",
    "RWRGroupedQueryAttention",
    "ablation",
    "callbacks",
    "data",
    "explain",
    "graph",
    "layers",
    "models",
    "ops",
    "options",
    "statistics",
]

__version__ = "0.2.0.dev0"


def __getattr__(name: str) -> Any:
    """Imports `keras_rwr.models` when it is first used: it needs KerasHub."""
    if name == "models":
        return importlib.import_module("keras_rwr.models")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
