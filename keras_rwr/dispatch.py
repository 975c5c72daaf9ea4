"""Which implementation runs a call, and why."""

import dataclasses
import importlib
import importlib.util

import keras
from keras import ops

from keras_rwr import portable, reference
from keras_rwr.config import RWRConfig

# Kernels: name -> (module, the backend they are for).
KERNELS = {
    "triton": ("keras_rwr.backends.torch", "torch"),
    "pallas": ("keras_rwr.backends.jax", "jax"),
    "xla": ("keras_rwr.backends.tensorflow", "tensorflow"),
}
# All implementations, fastest first.
IMPLEMENTATIONS = (*KERNELS, "portable", "reference")

# Both are filled here, not by a call, which a compiler may trace. A module of kernels imports its
# framework, which is the active backend, but no kernel yet.
_shipped = {name for name, (module, _) in KERNELS.items() if importlib.util.find_spec(module)}
_loaded = {"portable": portable, "reference": reference} | {
    name: importlib.import_module(KERNELS[name][0])
    for name in _shipped
    if KERNELS[name][1] == keras.backend.backend()
}


@dataclasses.dataclass(frozen=True)
class CallSpec:
    """What is known of a call before it runs.

    Args:
        backend: String, the Keras backend.
        device: String, `"cpu"`, `"gpu"` or `"tpu"`.
        dtype: String, the dtype of the query.
        query_shape: Tuple `(B, S, N, H)`, with `None` where a size is unknown.
        value_size: Int, features of a value.
        config: `RWRConfig`.
        has_graph: Bool. Whether the caller brings the graph.
    """

    backend: str
    device: str
    dtype: str
    query_shape: tuple
    value_size: int
    config: RWRConfig
    has_graph: bool = False


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The implementation that runs a call, and why others do not.

    Attributes:
        spec: The `CallSpec`.
        implementation: String, the name of the implementation that runs.
        refusals: Dict from the name of each implementation that cannot run to the reason.
    """

    spec: CallSpec
    implementation: str
    refusals: dict

    def __str__(self):
        spec = self.spec
        lines = [
            f"{self.implementation} runs {spec.dtype} {spec.query_shape} on {spec.device} "
            f"({spec.backend} backend)"
        ]
        for name in IMPLEMENTATIONS:
            if name in self.refusals:
                lines.append(f"  {name}: cannot run, {self.refusals[name]}")
            elif name != self.implementation:
                lines.append(f"  {name}: can run, slower")
        return "\n".join(lines)


def explain(query_shape, value_shape=None, dtype=None, device=None, has_graph=False, **options):
    """Tells which implementation `rwr_attention` would choose for a call.

    Args:
        query_shape: Tuple `(B, S, N, H)`; `None` for sizes that are unknown.
        value_shape: `None` for the shape of the query, or tuple `(B, S, N, V)`.
        dtype: String. Defaults to Keras's `floatx`.
        device: `None` for the active backend's, or `"cpu"`, `"gpu"`, `"tpu"`.
        has_graph: Bool. Whether the call brings a graph. Defaults to `False`.
        **options: Options of `keras_rwr.RWRConfig`.

    Returns:
        An `Explanation`; print it.

    Raises:
        ValueError: If a shape has another rank or an option is outside its range.
        TypeError: If an option is unknown or of the wrong type.

    Example:

    >>> print(keras_rwr.explain((1, 4096, 12, 64), is_causal=True))
    """
    for name, shape in (("query_shape", query_shape), ("value_shape", value_shape)):
        if shape is not None and len(shape) != 4:
            raise ValueError(f"`{name}` must have four entries. Received: {name}={shape}")
    spec = CallSpec(
        backend=keras.backend.backend(),
        device=current_device() if device is None else device,
        dtype=keras.backend.floatx() if dtype is None else keras.backend.standardize_dtype(dtype),
        query_shape=tuple(query_shape),
        value_size=(query_shape if value_shape is None else value_shape)[-1],
        config=RWRConfig(**options),
        has_graph=has_graph,
    )
    refusals = {name: why for name in IMPLEMENTATIONS if (why := _refusal(name, spec)) is not None}
    return Explanation(spec, choose(spec), refusals)


def choose(spec, implementation=None):
    """The name of the implementation that runs a call.

    Args:
        spec: `CallSpec`.
        implementation: `None` for the fastest that supports the call, or a name, which is never
            replaced by another.

    Returns:
        String, one of `IMPLEMENTATIONS`.

    Raises:
        NotImplementedError: If the named implementation cannot run the call.
    """
    if implementation is None:
        return next(name for name in IMPLEMENTATIONS if _refusal(name, spec) is None)
    reason = _refusal(implementation, spec)
    if reason is not None:
        raise NotImplementedError(
            f'`implementation="{implementation}"` cannot run this call: {reason}. '
            f"Received: {spec.dtype} query of shape {spec.query_shape} on {spec.device} "
            f"with the {spec.backend} backend"
        )
    return implementation


def load(name):
    """The module of an implementation, with `rwr_attention` and `supports`."""
    return _loaded[name]


def check_implementation(implementation):
    """Checks an implementation's name.

    Raises:
        ValueError: If there is no such implementation.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"`implementation` must be None or one of {', '.join(map(repr, IMPLEMENTATIONS))}. "
            f"Received: implementation={implementation!r}"
        )


def current_device(x=None):
    """`"cpu"`, `"gpu"` or `"tpu"`: where a tensor lives, or where the backend puts new ones."""
    backend = keras.backend.backend()
    if backend == "torch":
        kind = (ops.zeros(()) if x is None else x).device.type
        return "gpu" if kind == "cuda" else kind
    if backend == "numpy":
        return "cpu"
    return keras.distribution.list_devices()[0].split(":")[0].lower()


def _refusal(name, spec):
    if name in KERNELS:
        backend = KERNELS[name][1]
        if backend != spec.backend:
            return f"it needs the {backend} backend"
        if name not in _shipped:
            return f"this version of keras_rwr has no {name} kernels"
    return load(name).supports(spec)
