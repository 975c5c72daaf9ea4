"""The options of RWR attention as one validated value."""

import dataclasses
import math
import numbers

EDGE_WEIGHTS = ("cosine", "exponential")
FUSIONS = ("sum", "softmax")

# The options that decide the graph: two calls can share a graph only if these agree.
GRAPH_OPTIONS = (
    "window",
    "topk",
    "neighbor_block",
    "threshold",
    "edge_weight",
    "reversible",
    "is_causal",
)

CONCENTRATION_RANGE = (1.0, 40.0)


@dataclasses.dataclass(frozen=True)
class RWRConfig:
    """Every option of RWR attention that is not a tensor, checked once.

    Args:
        alpha: Float in (0, 1]. Restart probability of the walk.
        steps: Int >= 0. Number of walk steps.
        topk: Int >= 0, a multiple of `neighbor_block`. Tokens outside the window that each query
            links to; 0 means none.
        neighbor_block: Int >= 1. Those tokens come in blocks of this many consecutive keys;
            1 means single tokens. In a causal call at most `window + 1`.
        window: Int >= 0. Half-width of the local window: `|i - j| <= window`.
        threshold: `None` or float in [-1, 1). An edge needs a cosine above it. `None` means 0 for
            cosine edges and no cut for exponential ones.
        edge_weight: `"cosine"` or `"exponential"`.
        reversible: Bool. Symmetrise the graph, `S = (W + W^T) / 2`.
        reciprocal_beta: Float in [0, 1]. Forward share of the reciprocal mix; used only when
            `reversible`.
        fusion: `"sum"` or `"softmax"`.
        is_causal: Bool. Edges only to the past and to oneself.
        dropout: Float in [0, 1). Dropout rate of LOCAL's probabilities.
        block_size: `None` or int >= 1. Overrides the number of queries in an implementation's
            tile. Changes speed only.
        head_dim_pad: `None` or int >= 1. Kernels round the head size up to a multiple of it.
            Changes speed only.

    Raises:
        ValueError: If a value is outside its range, or two values do not fit together.
        TypeError: If a value is of the wrong type.
    """

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

    def __post_init__(self):
        _check_real("alpha", self.alpha, "in (0, 1]", lambda x: 0 < x <= 1)
        _check_int("steps", self.steps, minimum=0)
        _check_int("topk", self.topk, minimum=0)
        _check_int("neighbor_block", self.neighbor_block, minimum=1)
        _check_int("window", self.window, minimum=0)
        if self.threshold is not None:
            _check_real("threshold", self.threshold, "in [-1, 1)", lambda x: -1 <= x < 1)
        _check_choice("edge_weight", self.edge_weight, EDGE_WEIGHTS)
        _check_bool("reversible", self.reversible)
        _check_real("reciprocal_beta", self.reciprocal_beta, "in [0, 1]", lambda x: 0 <= x <= 1)
        _check_choice("fusion", self.fusion, FUSIONS)
        _check_bool("is_causal", self.is_causal)
        _check_real("dropout", self.dropout, "in [0, 1)", lambda x: 0 <= x < 1)
        for name in ("block_size", "head_dim_pad"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), minimum=1)
        if self.topk % self.neighbor_block:
            raise ValueError(
                "`topk` must be a multiple of `neighbor_block`. "
                f"Received: topk={self.topk}, neighbor_block={self.neighbor_block}"
            )
        if self.is_causal and self.topk and self.neighbor_block > self.window + 1:
            raise ValueError(
                "`neighbor_block` must be at most `window + 1` in a causal call, so that no block "
                f"reaches past its query. Received: neighbor_block={self.neighbor_block}, "
                f"window={self.window}"
            )

    @property
    def slots(self):
        """Number of key blocks that each query links to."""
        return self.topk // self.neighbor_block

    @property
    def mass(self):
        """Total weight of a walk, `rho = 1 - (1 - alpha)^(steps + 1)`."""
        return 1.0 - (1.0 - self.alpha) ** (self.steps + 1)

    @property
    def cut(self):
        """The cosine that an edge must exceed, or `None` for no cut."""
        if self.threshold is None and self.edge_weight == "cosine":
            return 0.0
        return self.threshold

    @property
    def is_reciprocal(self):
        """Whether the backward walk takes part."""
        return self.reversible and self.reciprocal_beta < 1.0


def check_per_head(name, value, num_heads, minimum=-math.inf, maximum=math.inf):
    """Checks a plain number, or a plain sequence of one number a head, against a range.

    Tensors pass unchecked: their values may not exist yet.

    Args:
        name: String, the argument's name.
        value: A number, a list or tuple of numbers, or a tensor.
        num_heads: Int or `None`. The length that a sequence must have, if known.
        minimum: Float. Smallest value allowed.
        maximum: Float. Largest value allowed.

    Raises:
        ValueError: If a number is outside the range or the length differs from `num_heads`.
        TypeError: If `value` is neither a number nor a sequence or tensor.
    """
    if isinstance(value, (str, bool, dict)) or value is None:
        raise TypeError(f"`{name}` must be a number or one number a head. Received: {name}={value}")
    if isinstance(value, numbers.Real):
        entries = [value]
    elif isinstance(value, (list, tuple)):
        if num_heads is not None and len(value) != num_heads:
            raise ValueError(
                f"`{name}` must have one value a head. "
                f"Received: {name}={value} for num_heads={num_heads}"
            )
        entries = value
    else:
        shape = tuple(value.shape)
        if shape not in ((), (1,), (num_heads,)):
            raise ValueError(
                f"`{name}` must be a scalar or have shape (num_heads,). "
                f"Received: {name} of shape {shape} for num_heads={num_heads}"
            )
        return
    for entry in entries:
        if not isinstance(entry, numbers.Real) or isinstance(entry, bool):
            raise TypeError(
                f"`{name}` must be a number or one number a head. Received: {name}={value}"
            )
        if not (math.isfinite(entry) and minimum <= entry <= maximum):
            bounds = (
                "finite"
                if minimum == -math.inf and maximum == math.inf
                else f"in [{minimum:g}, {maximum:g}]"
            )
            raise ValueError(f"`{name}` must be {bounds}. Received: {name}={value}")


def _check_int(name, value, minimum):
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be an integer. Received: {name}={value!r}")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}. Received: {name}={value}")


def _check_real(name, value, rule, holds):
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be a number. Received: {name}={value!r}")
    if not holds(value):
        raise ValueError(f"`{name}` must be {rule}. Received: {name}={value}")


def _check_bool(name, value):
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be a bool. Received: {name}={value!r}")


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(
            f"`{name}` must be one of {', '.join(map(repr, choices))}. Received: {name}={value!r}"
        )
