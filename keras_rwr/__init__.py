"""RWR attention for Keras 3: windowed attention plus a random walk with restart."""

from keras_rwr import callbacks, graph, ops
from keras_rwr.config import RWRConfig
from keras_rwr.dispatch import explain
from keras_rwr.layer import RWRAttention

__all__ = ["RWRAttention", "RWRConfig", "callbacks", "explain", "graph", "ops"]

__version__ = "0.1.0"
