"""What RWR attention means and how it is computed: validated values that every part passes on."""

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any, Self

from keras_rwr._checks import check_bool, check_choice, check_int, check_per_head, check_real

__all__ = ["Options", "Tuning"]

CONCENTRATION_RANGE = (1.0, 64.0)
IMPLEMENTATIONS = ("triton", "pallas", "portable", "reference")  # fastest first
_EDGE_WEIGHTS = ("cosine", "exponential")
_FUSIONS = ("sum", "softmax")
_STOPPINGS = ("restart", "learned", "gated")


class _Fields:
    """What the values here have in common: their fields are keyword arguments elsewhere."""

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of all fields, in order."""
        # `torch.compile` does not see through `dataclasses.fields` of a class.
        return tuple(cls.__dataclass_fields__)  # type: ignore[attr-defined]

    @classmethod
    def pick(cls, arguments: Mapping[str, Any]) -> Self:
        """Takes the fields out of a mapping that holds other things too."""
        return cls(**{name: arguments[name] for name in cls.names() if name in arguments})

    def to_config(self) -> dict[str, Any]:
        """The fields as a dict that a configuration can hold."""
        fields = {name: getattr(self, name) for name in self.names()}
        return {name: list(x) if isinstance(x, tuple) else x for name, x in fields.items()}

    def replace(self, **changes: Any) -> Self:
        """A copy with other values for some fields."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


@dataclasses.dataclass(frozen=True)
class Options(_Fields):
    """What an attention layer computes.

    Args:
        alpha: Float in (0, 1]. Restart probability of the walk. Defaults to 0.2.
        steps: Int >= 0. Number of walk steps. Defaults to 4.
        topk: Int >= 0, a multiple of `neighbor_block`. Tokens outside the window that each query
            links to; 0 means none. Defaults to 32.
        neighbor_block: Int >= 1. Those tokens come in blocks of this many consecutive keys; 1
            means single tokens. In a causal call at most `window + 1`. Defaults to 16.
        window: Int >= 0. Half-width of the local window, `|i - j| <= window`. Defaults to 128.
        threshold: `None` or float in [-1, 1). An edge needs a cosine above it. `None` means 0 for
            cosine edges and no cut for exponential ones.
        edge_weight: `"cosine"` (the default) or `"exponential"`.
        concentration: Float in [1, 64], or one a head (one a graph with `graph_heads`). Initial
            sharpness of exponential edges. Defaults to 20.
        reversible: Bool. Symmetrise the graph, `S = (W + W^T) / 2`. Defaults to `False`.
        reciprocal_beta: Float in [0, 1]. Forward share of the reciprocal mix; used only when
            `reversible`. Defaults to 0.5.
        lens_strength: Float, or one a head. Weight of the walk. Defaults to 0.3.
        trainable_lens: Bool. Whether `lens_strength` is trained. Defaults to `False`.
        use_discoverability: Bool. Whether to train a vector that says how easily a key is found.
            Defaults to `False`.
        fusion: `"sum"` (the default) or `"softmax"`.
        graph_heads: `None`: each query head has a graph of its own, from its query and key. Int
            >= 1: the layer has so many graphs, each shared by an equal number of heads.
        graph_dim: Int >= 1. Size of the queries and keys of `graph_heads`. Defaults to 64.
        graph_convolution: Int >= 2. Width of the causal convolution of the graph's keys, which
            begins as a shift by one token. Defaults to 4.
        self_edges: Bool. Whether a token is its own neighbour in the walk. Defaults to `True`.
        stopping: `"restart"` (the default), `"learned"` or `"gated"`: the weight of a walk of t
            steps is that of a restart, trained, or trained and gated by each token.

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
    concentration: float | tuple[float, ...] = 20.0
    reversible: bool = False
    reciprocal_beta: float = 0.5
    lens_strength: float | tuple[float, ...] = 0.3
    trainable_lens: bool = False
    use_discoverability: bool = False
    fusion: str = "sum"
    graph_heads: int | None = None
    graph_dim: int = 64
    graph_convolution: int = 4
    self_edges: bool = True
    stopping: str = "restart"

    def __post_init__(self) -> None:
        for name in ("concentration", "lens_strength"):
            object.__setattr__(self, name, _plain(getattr(self, name)))
        check_real("alpha", self.alpha, "in (0, 1]", lambda x: 0 < x <= 1)
        check_int("steps", self.steps, minimum=0)
        check_int("topk", self.topk, minimum=0)
        check_int("neighbor_block", self.neighbor_block, minimum=1)
        check_int("window", self.window, minimum=0)
        if self.threshold is not None:
            check_real("threshold", self.threshold, "in [-1, 1)", lambda x: -1 <= x < 1)
        check_choice("edge_weight", self.edge_weight, _EDGE_WEIGHTS)
        check_per_head("concentration", self.concentration, None, *CONCENTRATION_RANGE)
        check_bool("reversible", self.reversible)
        check_real("reciprocal_beta", self.reciprocal_beta, "in [0, 1]", lambda x: 0 <= x <= 1)
        check_per_head("lens_strength", self.lens_strength)
        check_bool("trainable_lens", self.trainable_lens)
        check_bool("use_discoverability", self.use_discoverability)
        check_choice("fusion", self.fusion, _FUSIONS)
        if self.graph_heads is not None:
            check_int("graph_heads", self.graph_heads, minimum=1)
        check_int("graph_dim", self.graph_dim, minimum=1)
        check_int("graph_convolution", self.graph_convolution, minimum=2)
        check_bool("self_edges", self.self_edges)
        check_choice("stopping", self.stopping, _STOPPINGS)
        self._check_together()

    def _check_together(self) -> None:
        if self.topk % self.neighbor_block:
            raise ValueError(
                "`topk` must be a multiple of `neighbor_block`. "
                f"Received: topk={self.topk}, neighbor_block={self.neighbor_block}"
            )
        if self.stopping != "restart":
            self.check_defaults(
                f'`stopping="{self.stopping}"` trains the weight of each number of steps',
                "alpha",
                "lens_strength",
                "trainable_lens",
            )
        if self.stopping == "gated" and self.is_reciprocal:
            raise ValueError(
                "`reciprocal_beta` must be 1 where each token has hop weights of its own: the "
                "reciprocal mix needs the same for all. "
                f"Received: reciprocal_beta={self.reciprocal_beta}"
            )
        if self.fusion == "softmax":
            self.check_defaults(
                '`fusion="softmax"` adds the walk to the logits of each head',
                "graph_heads",
                "self_edges",
                "stopping",
            )

    def check_defaults(self, reason: str, *names: str) -> None:
        """Checks that options which another one makes meaningless were left alone."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in names and value != field.default:
                raise ValueError(
                    f"`{field.name}` must be left at its default: {reason}. "
                    f"Received: {field.name}={value!r}"
                )

    def local_only(self) -> "Options":
        """The options of a layer that is LOCAL alone, with the same window."""
        return Options(window=self.window, topk=0, steps=0, lens_strength=0.0)

    @property
    def walks(self) -> bool:
        """Whether there is a walk, or its own value, besides LOCAL."""
        fixed = self.stopping == "restart" and not self.trainable_lens
        return not (fixed and self.steps == 0 and self.lens_strength == 0.0)

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

    @property
    def restart_weights(self) -> list[float]:
        """The weights of 0 to `steps` steps before a restart, `alpha (1 - alpha)^t`."""
        return [self.alpha * (1.0 - self.alpha) ** t for t in range(self.steps + 1)]


@dataclasses.dataclass(frozen=True)
class Tuning(_Fields):
    """How it is computed. Nothing here changes a result beyond its rounding.

    Args:
        block_size: `None` or int >= 1. Queries in a tile; `None` lets the implementation choose.
        head_dim_pad: `None` or int >= 1. Pallas rounds the head size up to a multiple of it.
        implementation: `None` for the fastest that supports the call, or the name of one, which is
            then used or raises.

    Raises:
        ValueError: If a value is outside its range.
        TypeError: If a value is of the wrong type.
    """

    block_size: int | None = None
    head_dim_pad: int | None = None
    implementation: str | None = None

    def __post_init__(self) -> None:
        for name in ("block_size", "head_dim_pad"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), minimum=1)
        if self.implementation is not None:
            check_choice("implementation", self.implementation, IMPLEMENTATIONS)


@dataclasses.dataclass(frozen=True)
class Call(_Fields):
    """What one call adds to the options.

    Args:
        is_causal: Bool. Whether a token sees only itself and its past.
        dropout: Float in [0, 1). Dropout rate of LOCAL's probabilities.

    Raises:
        ValueError: If `dropout` is outside its range.
        TypeError: If a value is of the wrong type.
    """

    is_causal: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_bool("is_causal", self.is_causal)
        check_real("dropout", self.dropout, "in [0, 1)", lambda x: 0 <= x < 1)

    def check(self, options: Options, has_segments: bool = False) -> None:
        """Checks that blocks of keys lie on one side of what a query may see."""
        block = options.neighbor_block
        if options.topk == 0 or block == 1:
            return
        if self.is_causal and block > options.window + 1:
            raise ValueError(
                "`neighbor_block` must be at most `window + 1` in a causal call, so that no block "
                "reaches past its query. "
                f"Received: neighbor_block={block}, window={options.window}"
            )
        if has_segments:
            raise ValueError(
                "`neighbor_block` must be 1, or `topk` 0, with `segment_ids`: a block of keys "
                f"would straddle documents. Received: neighbor_block={block}"
            )


def _plain(value: Any) -> Any:
    """Sequences of numbers as tuples of Python's own, other values as they are."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(value, tuple):
        return tuple(float(x) if _is_number(x) else x for x in value)
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
