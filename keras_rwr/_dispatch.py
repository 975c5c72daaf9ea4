"""Which implementation runs a call, and why."""

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, Self

import keras
from keras import ops

from keras_rwr._checks import check_bool, check_choice
from keras_rwr._heads import contain_vectors
from keras_rwr._local import attend_locally
from keras_rwr._select import select
from keras_rwr._tensors import contain, unit, where
from keras_rwr._walk import walk
from keras_rwr._weigh import weigh
from keras_rwr.options import IMPLEMENTATIONS, Call, Options, Tuning

if TYPE_CHECKING:
    from keras_rwr._heads import Inputs

# Modules of kernels: name -> (module, the backend they are for). A module brings `supports`, and
# either `stages`, which returns a dict for `Stages`, or the whole operation as `select_neighbors`
# and `rwr_attention`.
KERNELS = {
    "triton": ("keras_rwr.backends.torch", "torch"),
    "pallas": ("keras_rwr.backends.jax", "jax"),
}


@dataclasses.dataclass(frozen=True)
class Stages:
    """The stages of the operation, each of which kernels may replace.

    Attributes:
        contain: Function, as `keras_rwr._heads.contain_vectors`.
        unit: Function, as `keras_rwr._tensors.unit`.
        select: Function, as `keras_rwr._select.select`.
        weigh: Function, as `keras_rwr._weigh.weigh`.
        walk: Function, as `keras_rwr._walk.walk`.
        attend_locally: Function, as `keras_rwr._local.attend_locally`.
    """

    contain: Callable = contain_vectors
    unit: Callable = unit
    select: Callable = select
    weigh: Callable = weigh
    walk: Callable = walk
    attend_locally: Callable = attend_locally


PORTABLE = Stages()

# Filled here, not by a call, which a compiler may trace. A module of kernels imports its
# framework, which is the active backend, but no kernel yet.
_loaded: dict[str, ModuleType] = {
    name: importlib.import_module(module)
    for name, (module, backend) in KERNELS.items()
    if backend == keras.backend.backend() and importlib.util.find_spec(module)
}


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """The options of a call that kernels look at, of `Options`, `Call` and `Tuning`."""

    alpha: float = 0.2
    steps: int = 4
    topk: int = 32
    neighbor_block: int = 16
    window: int = 128
    threshold: float | None = None
    edge_weight: str = "cosine"
    reversible: bool = False
    reciprocal_beta: float = 0.5
    fusion: str = "sum"
    is_causal: bool = False
    dropout: float = 0.0
    block_size: int | None = None
    head_dim_pad: int | None = None

    @classmethod
    def of(cls, options: Options, call: Call, tuning: Tuning) -> Self:
        """Takes the fields from where they stand."""
        values = {**options.to_config(), **call.to_config(), **tuning.to_config()}
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})

    @property
    def slots(self) -> int:
        """Number of key blocks that each query links to."""
        return self.topk // self.neighbor_block

    @property
    def cut(self) -> float | None:
        """The cosine that an edge must exceed, or `None` for no cut."""
        if self.threshold is None and self.edge_weight == "cosine":
            return 0.0
        return self.threshold

    @property
    def is_reciprocal(self) -> bool:
        """Whether the backward walk takes part."""
        return self.reversible and self.reciprocal_beta < 1.0


@dataclasses.dataclass(frozen=True)
class CallSpec:
    """What is known of a call before it runs.

    Attributes:
        backend: String, the Keras backend.
        device: String, `"cpu"`, `"gpu"` or `"tpu"`.
        dtype: String, the dtype of the query.
        query_shape: Tuple `(B, S, N, H)`, with `None` where a size is unknown.
        value_size: Int, features of a value.
        config: `KernelCall`.
        graph_size: `None` where no graph is made, or int, features of its vectors.
        has_graph: Bool. Whether the caller brings the graph.
        beyond_kernels: `None`, or what the call asks for that no kernel of the whole operation has.
    """

    backend: str
    device: str
    dtype: str
    query_shape: tuple
    value_size: int
    config: KernelCall
    graph_size: int | None = None
    has_graph: bool = False
    beyond_kernels: str | None = None

    @classmethod
    def of(cls, inputs: "Inputs", options: Options, call: Call, tuning: Tuning) -> Self:
        """Describes a call."""
        vectors = (inputs.query, inputs.key, inputs.value)
        dtypes = [keras.backend.standardize_dtype(x.dtype) for x in vectors]
        graph = inputs.query if inputs.graph_query is None else inputs.graph_query
        makes_graph = options.steps > 0 and inputs.graph is None
        return cls(
            backend=keras.backend.backend(),
            device=current_device(inputs.query),
            dtype="float64" if "float64" in dtypes else dtypes[0],
            query_shape=tuple(inputs.query.shape),
            value_size=inputs.value.shape[-1],
            graph_size=graph.shape[-1] if makes_graph else None,
            config=KernelCall.of(options, call, tuning),
            has_graph=inputs.graph is not None,
            beyond_kernels=_beyond_kernels(
                options,
                graph_query=inputs.graph_query is not None,
                hop_weights=inputs.hop_weights is not None,
                segment_ids=inputs.segment_ids is not None,
                grouped=inputs.key.shape[2] != inputs.query.shape[2],
            ),
        )


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
    refusals: dict[str, str]

    def __str__(self) -> str:
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


def explain(
    query_shape: tuple,
    value_shape: tuple | None = None,
    dtype: str | None = None,
    device: str | None = None,
    is_causal: bool = False,
    dropout: float = 0.0,
    has_graph: bool = False,
    has_segments: bool = False,
    **options: Any,
) -> Explanation:
    """Tells which implementation RWR attention would choose for a call.

    Args:
        query_shape: Tuple `(B, S, N, H)`; `None` for sizes that are unknown.
        value_shape: `None` for the shape of the query, or tuple `(B, S, M, V)`.
        dtype: `None` for Keras's `floatx`, or the name of a float dtype.
        device: `None` for the active backend's, or `"cpu"`, `"gpu"`, `"tpu"`.
        is_causal: Bool. Whether the call is causal. Defaults to `False`.
        dropout: Float in [0, 1). Its dropout rate. Defaults to 0.
        has_graph: Bool. Whether the call brings a graph. Defaults to `False`.
        has_segments: Bool. Whether it brings `segment_ids`. Defaults to `False`.
        **options: Fields of `keras_rwr.options.Options` and `keras_rwr.options.Tuning`.

    Returns:
        An `Explanation`; print it.

    Raises:
        ValueError: If a shape has another rank or an option is outside its range.
        TypeError: If an option is unknown or of the wrong type.

    Example:

    >>> print(keras_rwr.explain((1, 4096, 12, 64), is_causal=True))
    """
    for name, shape in (("query_shape", query_shape), ("value_shape", value_shape)):
        if name == "value_shape" and shape is None:
            continue
        if not isinstance(shape, (tuple, list)) or not all(
            x is None or (isinstance(x, int) and not isinstance(x, bool)) for x in shape
        ):
            raise TypeError(
                f"`{name}` must be a tuple of ints or `None`. Received: {name}={shape!r}"
            )
        if len(shape) != 4:
            raise ValueError(f"`{name}` must have four entries. Received: {name}={shape}")
    unknown = set(options) - {*Options.names(), *Tuning.names()}
    if unknown:
        raise TypeError(
            f"Options must be among {', '.join((*Options.names(), *Tuning.names()))}. "
            f"Received: {', '.join(sorted(unknown))}"
        )
    if device is not None:
        check_choice("device", device, ("cpu", "gpu", "tpu"))
    dtype = keras.backend.floatx() if dtype is None else dtype
    check_choice("dtype", dtype, ("bfloat16", "float16", "float32", "float64"))
    check_bool("has_graph", has_graph)
    check_bool("has_segments", has_segments)
    value_shape = query_shape if value_shape is None else value_shape
    meaning, tuning = Options.pick(options), Tuning.pick(options)
    call = Call(is_causal, dropout)
    call.check(meaning, has_segments)
    graph_size = query_shape[-1] if meaning.graph_heads is None else meaning.graph_dim
    spec = CallSpec(
        backend=keras.backend.backend(),
        device=current_device() if device is None else device,
        dtype=dtype,
        query_shape=tuple(query_shape),
        value_size=value_shape[-1],
        graph_size=graph_size if meaning.steps > 0 and not has_graph else None,
        config=KernelCall.of(meaning, call, tuning),
        has_graph=has_graph,
        beyond_kernels=_beyond_kernels(
            meaning,
            graph_query=meaning.graph_heads is not None,
            hop_weights=meaning.stopping != "restart",
            segment_ids=has_segments,
            grouped=value_shape[2] != query_shape[2],
        ),
    )
    refusals = {name: why for name in IMPLEMENTATIONS if (why := refusal(name, spec)) is not None}
    return Explanation(spec, choose(spec, tuning.implementation), refusals)


def choose(spec: CallSpec, implementation: str | None = None) -> str:
    """The name of the implementation that runs a call.

    Args:
        spec: `CallSpec`.
        implementation: `None` for the fastest that supports the call, or a name, which is never
            replaced by another.

    Raises:
        NotImplementedError: If the named implementation cannot run the call.
    """
    if implementation is None:
        return next(name for name in IMPLEMENTATIONS if refusal(name, spec) is None)
    reason = refusal(implementation, spec)
    if reason is not None:
        raise NotImplementedError(
            f'`implementation="{implementation}"` cannot run this call: {reason}. '
            f"Received: {spec.dtype} query of shape {spec.query_shape} on {spec.device} "
            f"with the {spec.backend} backend"
        )
    return implementation


def refusal(name: str, spec: CallSpec) -> str | None:
    """Why an implementation cannot run a call, or `None`."""
    if name == "reference":
        return None
    if name == "portable":
        if spec.config.fusion != "sum":
            return f'fusion "{spec.config.fusion}" needs the dense rows of the walk'
        return None
    backend = KERNELS[name][1]
    if backend != spec.backend:
        return f"it needs the {backend} backend"
    if name not in _loaded:
        return f"this version of keras_rwr has no {name} kernels"
    if runs_whole(name) and spec.beyond_kernels is not None:
        return f"its kernels have no {spec.beyond_kernels}"
    return _loaded[name].supports(spec)


def runs_whole(name: str) -> bool:
    """Whether an implementation that was chosen has kernels of the whole operation."""
    return name in KERNELS and not hasattr(_loaded[name], "stages")


def stages(name: str) -> Stages:
    """The stages of an implementation that was chosen and does not run the whole operation."""
    return Stages(**_loaded[name].stages()) if name in KERNELS else PORTABLE


def load(name: str) -> ModuleType:
    """The module of kernels of the active backend."""
    return _loaded[name]


def run_kernel(name: str, inputs: "Inputs", config: KernelCall) -> Any:
    """Runs kernels of the whole operation, `(B, S, N, V)`."""
    module = _loaded[name]
    query, key, value, poison = inputs.query, inputs.key, inputs.value, 0.0
    if config.is_causal:
        query, key, value, poison = _contain(inputs)
    neighbors = None
    if config.steps > 0:
        neighbors = module.select_neighbors(query, key, config, inputs.padding_mask)
    output = module.rwr_attention(
        query,
        key,
        value,
        config,
        lens_strength=inputs.lens_strength,
        concentration=inputs.concentration,
        discoverability=inputs.discoverability,
        padding_mask=inputs.padding_mask,
        seed=inputs.seed,
        neighbors=neighbors,
    )
    if not config.is_causal:
        return output
    output = output + ops.cast(poison, output.dtype)
    if inputs.padding_mask is None:
        return output
    return where(ops.cast(inputs.padding_mask, "bool")[:, :, None, None], output, 0.0)


def _contain(inputs: "Inputs") -> tuple[Any, ...]:
    """See `keras_rwr._tensors.contain`; here heads come after positions."""
    vectors = [inputs.query, inputs.key, inputs.value]
    if inputs.padding_mask is not None:
        real = ops.cast(inputs.padding_mask, "bool")[:, :, None, None]
        vectors = [where(real, x, ops.cast(0.0, x.dtype)) for x in vectors]
    *clean, poison = contain(*(ops.transpose(x, (0, 2, 1, 3)) for x in vectors))
    return (*(ops.transpose(x, (0, 2, 1, 3)) for x in (*clean, poison)),)


def current_device(x: Any = None) -> str:
    """`"cpu"`, `"gpu"` or `"tpu"`: where a tensor lives, or where the backend puts new ones."""
    backend = keras.backend.backend()
    if backend == "torch":
        kind = (ops.zeros(()) if x is None else x).device.type
        return "gpu" if kind == "cuda" else kind
    if backend == "numpy":
        return "cpu"
    return keras.distribution.list_devices()[0].split(":")[0].lower()


def _beyond_kernels(
    options: Options, graph_query: bool, hop_weights: bool, segment_ids: bool, grouped: bool
) -> str | None:
    """What a call asks for that kernels of the whole operation do not have, or `None`."""
    asked = {
        "graph of its own": graph_query,
        "hop weights": hop_weights,
        "segments": segment_ids,
        "grouped heads": grouped,
        "graph without self edges": not options.self_edges,
    }
    return next((what for what, is_asked in asked.items() if is_asked), None)
