"""RWR attention as functions of query, key and value."""

from typing import Any

import keras
from keras import ops
from keras.src.backend import any_symbolic_tensors

from keras_rwr._attend import attend, attention_matrix, transition_matrix
from keras_rwr._checks import as_tensor, check_per_head, check_shape, compatible, is_tensor
from keras_rwr._heads import Heads, Inputs
from keras_rwr._tensors import maximum, where
from keras_rwr._walk import apart, side_by_side
from keras_rwr.graph import SparseGraph, check_fits, check_rows
from keras_rwr.options import CONCENTRATION_RANGE, Call, Options, Tuning

__all__ = ["attention_scores", "rwr_attention", "token_importance"]

Tensor = Any

_TENSORS = Inputs.names()


def rwr_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    alpha: float = 0.2,
    steps: int = 4,
    topk: int = 32,
    neighbor_block: int = 16,
    window: int = 128,
    threshold: float | None = None,
    edge_weight: str = "cosine",
    concentration: Any = 20.0,
    reversible: bool = False,
    reciprocal_beta: float = 0.5,
    lens_strength: Any = 0.3,
    fusion: str = "sum",
    self_edges: bool = True,
    discoverability: Tensor = None,
    padding_mask: Tensor = None,
    graph_query: Tensor = None,
    graph_key: Tensor = None,
    hop_weights: Tensor = None,
    segment_ids: Tensor = None,
    is_causal: bool = False,
    dropout: float = 0.0,
    seed: Any = None,
    graph: SparseGraph | None = None,
    block_size: int | None = None,
    head_dim_pad: int | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Windowed attention plus a random walk with restart over a graph of similar tokens.

    `y_i = LOCAL(i) + sum_t theta_t (P^t V)_i` over t = 0 … steps. LOCAL is softmax attention over
    the keys within `window`; `P_ij` is proportional to the weight of the edge from i to j, see
    `keras_rwr.graph`; `theta_t = lens_strength * alpha * (1 - alpha)^t` is the weight of a walk of
    t steps before a restart, unless `hop_weights` says otherwise.

    Args:
        query: Float tensor of shape `(B, S, N, H)`.
        key: Float tensor of shape `(B, S, M, H)`. M divides N: query head n uses key head
            `n * M // N`.
        value: Float tensor of shape `(B, S, M, V)`.
        alpha: Float in (0, 1]. Restart probability. Defaults to 0.2.
        steps: Int >= 0. Walk steps T. Defaults to 4.
        topk: Int >= 0, a multiple of `neighbor_block`. Tokens outside the window that a query
            links to. Defaults to 32.
        neighbor_block: Int >= 1, at most `window + 1` when causal. They come in blocks of this
            many keys. Defaults to 16.
        window: Int >= 0. Half-width of the local window, `|i - j| <= window`. Defaults to 128.
        threshold: `None` or float in [-1, 1). An edge needs a cosine above it; `None` means 0 for
            cosine edges and no cut for exponential ones.
        edge_weight: `"cosine"` (the default) or `"exponential"`, `exp(concentration * (c - 1))`.
        concentration: Float in [1, 64], or one a graph. Used by exponential edges only. Defaults
            to 20.
        reversible: Bool. Symmetrise the graph. Defaults to `False`.
        reciprocal_beta: Float in [0, 1]. Forward share of the mix of the walk with its reversal;
            used only when `reversible`. Defaults to 0.5.
        lens_strength: Float, or one a head. The walk's weight gamma. Defaults to 0.3.
        fusion: `"sum"` (the default), or `"softmax"`: one softmax over the window and the `topk`
            tokens that the walk visits most. That one takes O(S^2) memory: for analysis and short
            contexts.
        self_edges: Bool. Whether a token is its own neighbour in the walk. Defaults to `True`.
        discoverability: `None` or tensor of shape `(N, H)`, the vector u: `b_j = clip(k_j u, -8,
            8)` is added to LOCAL's logits, `exp(b_j)` multiplies the walk's weights. With
            `graph_key` its shape is `(G, F)`, k is `graph_key`, and only the walk takes it. A
            `graph` brings its own.
        padding_mask: `None` or tensor of shape `(B, S)`, true at real tokens. Outputs at padding
            are 0.
        graph_query: `None` or float tensor of shape `(B, S, G, F)`: the graph is built from it and
            `graph_key`, and shared by `N / G` heads. G divides M. `None` means that each query head
            has a graph of its own, from its query and key.
        graph_key: `None` or float tensor of the shape of `graph_query`.
        hop_weights: `None` or float tensor theta of shape `(T + 1,)`, `(N, T + 1)` or `(B, S, N, T
            + 1)`, of any sign, in place of `alpha`, `steps` and `lens_strength`, which must then be
            left at their defaults (`steps` may be T).
        segment_ids: `None` or int tensor of shape `(B, S)`: tokens of different segments do not
            see each other. Needs `neighbor_block=1` or `topk=0`.
        is_causal: Bool. A token sees itself and its past only. Defaults to `False`.
        dropout: Float in [0, 1). Dropout rate of the softmax probabilities. Defaults to 0.
        seed: Int, `keras.random.SeedGenerator`, or int tensor of shape `(2,)`. Needed, and used,
            when `dropout > 0`. A tensor of shape `(4,)` ends in the position of the first batch
            entry and of the first head, for a call that is one piece of a larger one.
        graph: `None`, or a graph from `keras_rwr.graph.normalize_to_p` that was built with the
            same options, to walk on instead of building one.
        block_size: `None` or int >= 1. Queries in a tile; changes speed only.
        head_dim_pad: `None` or int >= 1. Pallas rounds the head size up to a multiple of it;
            changes speed only.
        implementation: `None` for the fastest that supports the call, or `"reference"`,
            `"portable"`, `"triton"`, `"pallas"`, which never falls back.

    Returns:
        Tensor of shape `(B, S, N, V)` in the dtype of `query`. The arithmetic is in float32, or in
        float64 if an input is. Under `torch.autocast` the vectors and the output have its dtype. In
        a causal call a token with a NaN or infinity makes its own output NaN, and those of later
        tokens that see it, but no earlier one.

    Raises:
        ValueError: If an argument is outside its range, or shapes do not fit.
        TypeError: If an argument is of the wrong type.
        NotImplementedError: If the named implementation cannot run the call.

    Gradients are bounded by definition: they count the norm of a query or key of the graph below
    0.1 as 0.1, and a degree below 1 as 1 for cosine edges.

    Reference:
        - [Tong et al., 2006](https://doi.org/10.1109/ICDM.2006.70): random walk with restart
        - [Klicpera et al., 2019](https://arxiv.org/abs/1810.05997): its propagation scheme, APPNP
        - [Wang et al., 2021](https://arxiv.org/abs/2009.14332): multi-hop attention, MAGNA
    """
    options, call, tensors = _read(
        query=query,
        key=key,
        value=value,
        alpha=alpha,
        steps=steps,
        topk=topk,
        neighbor_block=neighbor_block,
        window=window,
        threshold=threshold,
        edge_weight=edge_weight,
        concentration=concentration,
        reversible=reversible,
        reciprocal_beta=reciprocal_beta,
        lens_strength=lens_strength,
        fusion=fusion,
        self_edges=self_edges,
        discoverability=discoverability,
        padding_mask=padding_mask,
        graph_query=graph_query,
        graph_key=graph_key,
        hop_weights=hop_weights,
        segment_ids=segment_ids,
        is_causal=is_causal,
        dropout=dropout,
        seed=seed,
        graph=graph,
    )
    tuning = Tuning(block_size, head_dim_pad, implementation)
    if not any_symbolic_tensors(tuple(tensors.values())):
        return attend(Inputs(**tensors), options, call, tuning)
    operation = RWRAttentionOperation(options, call, tuning)
    query, key, value = tensors.pop("query"), tensors.pop("key"), tensors.pop("value")
    return operation.symbolic_call(query, key, value, tensors)


@keras.saving.register_keras_serializable(package="keras_rwr")
class RWRAttentionOperation(keras.Operation):
    """`rwr_attention` with its options fixed, as a node of a functional model.

    Args:
        options: `Options`, or a dict of its fields.
        call: `Call`, or a dict of its fields.
        tuning: `Tuning`, or a dict of its fields.
        name: `None` or string.
    """

    def __init__(self, options: Any, call: Any, tuning: Any, *, name: str | None = None):
        super().__init__(name=name)
        self.options = Options(**options) if isinstance(options, dict) else options
        self.call_facts = Call(**call) if isinstance(call, dict) else call
        self.tuning = Tuning(**tuning) if isinstance(tuning, dict) else tuning

    def get_config(self) -> dict[str, Any]:
        return {
            "options": self.options.to_config(),
            "call": self.call_facts.to_config(),
            "tuning": self.tuning.to_config(),
            "name": self.name,
        }

    def call(self, query: Tensor, key: Tensor, value: Tensor, tensors: dict[str, Any]) -> Tensor:
        inputs = Inputs(query=query, key=key, value=value, **tensors)
        return attend(inputs, self.options, self.call_facts, self.tuning)

    def compute_output_spec(
        self, query: Tensor, key: Tensor, value: Tensor, tensors: dict[str, Any]
    ) -> keras.KerasTensor:
        return keras.KerasTensor((*query.shape[:3], value.shape[-1]), dtype=query.dtype)


def attention_scores(
    query: Tensor,
    key: Tensor,
    *,
    alpha: float = 0.2,
    steps: int = 4,
    topk: int = 32,
    neighbor_block: int = 16,
    window: int = 128,
    threshold: float | None = None,
    edge_weight: str = "cosine",
    concentration: Any = 20.0,
    reversible: bool = False,
    reciprocal_beta: float = 0.5,
    lens_strength: Any = 0.3,
    fusion: str = "sum",
    self_edges: bool = True,
    discoverability: Tensor = None,
    padding_mask: Tensor = None,
    graph_query: Tensor = None,
    graph_key: Tensor = None,
    hop_weights: Tensor = None,
    segment_ids: Tensor = None,
    is_causal: bool = False,
    graph: SparseGraph | None = None,
) -> Tensor:
    """The dense matrix A with `rwr_attention(q, k, v) = A v`: softmax LOCAL plus the walk.

    It takes O(S^2) memory and O(S^3) time: for analysis of short contexts. Nothing is dropped out.

    Args: as for `rwr_attention`.

    Returns:
        Tensor of shape `(B, N, S, S)`, in the dtype of `query`.

    Raises: as `rwr_attention`.
    """
    options, call, tensors = _read(**locals() | {"value": key})
    matrix = attention_matrix(Inputs(**tensors), options, call)
    return ops.cast(matrix, tensors["query"].dtype)


def token_importance(
    query: Tensor,
    key: Tensor,
    *,
    alpha: float = 0.2,
    steps: int = 4,
    topk: int = 32,
    neighbor_block: int = 16,
    window: int = 128,
    threshold: float | None = None,
    edge_weight: str = "cosine",
    concentration: Any = 20.0,
    reversible: bool = False,
    self_edges: bool = True,
    discoverability: Tensor = None,
    padding_mask: Tensor = None,
    graph_query: Tensor = None,
    graph_key: Tensor = None,
    hop_weights: Tensor = None,
    segment_ids: Tensor = None,
    is_causal: bool = False,
    graph: SparseGraph | None = None,
) -> Tensor:
    """How much the walks of all tokens visit each token, `sum_i r_ij / S`.

    The transpose of P is walked once from all tokens together, in O(S) memory. `r = sum_t theta_t
    P^t` is the forward walk, without the reciprocal mix and without `lens_strength`, and S counts a
    sequence's real tokens, so that the importances of a sequence sum to `1 - (1 - alpha)^(steps +
    1)`, or to the mean sum of `hop_weights`.

    Args: as for `rwr_attention`.

    Returns:
        Tensor of shape `(B, S, N)`, in float32 (float64 for a float64 query); 0 at padding.

    Raises: as `rwr_attention`.

    Reference:
        - [Page et al., 1999](http://ilpubs.stanford.edu:8090/422/): PageRank
    """
    options, call, tensors = _read(**locals() | {"value": key})
    heads = Heads.create(Inputs(**tensors), options, call)
    transition = transition_matrix(heads, options, Tuning())
    graphs, number = transition.graphs, heads.query.shape[1]
    real = ops.cast(heads.tokens.real, heads.query.dtype)
    start = real / maximum(ops.sum(real, axis=2, keepdims=True), 1.0)  # (B or 1, 1, S, 1)
    start = heads.hop_weights * ops.broadcast_to(
        start, (ops.shape(query)[0], number, ops.shape(query)[1], 1)
    )  # (B, N, S, T + 1)

    def column(t: int) -> Tensor:
        return transition.tiling.pad(side_by_side(start[..., t : t + 1], graphs))

    # Horner's scheme on the transpose: u <- theta_t s + P^T u.
    visits = column(options.steps)
    for t in reversed(range(options.steps)):
        visits = column(t) + transition.matrix.transposed_matmul(visits)
    visits = apart(transition.tiling.cut(visits), number)
    visits = where(heads.tokens.real, visits + heads.poison, 0.0)
    return ops.transpose(visits[..., 0], (0, 2, 1))


def _read(**arguments: Any) -> tuple[Options, Call, dict[str, Any]]:
    """Checks the arguments of a call: its options, its facts, and its tensors by name."""
    tensors: dict[str, Any] = {name: arguments.get(name) for name in _TENSORS}
    numbers = ("concentration", "lens_strength")
    if "lens_strength" not in arguments:
        tensors["lens_strength"] = 1.0
    # Numbers that may be tensors are checked beside the number of heads.
    options = Options.pick({k: v for k, v in arguments.items() if k not in numbers})
    call = Call.pick(arguments)
    for name in ("query", "key", "value"):
        tensors[name] = as_tensor(name, tensors[name])
    query, key, value = tensors["query"], tensors["key"], tensors["value"]
    check_shape("query", query, "(B, S, N, H)", (None, None, None, None))
    batch, size, heads, features = query.shape
    check_shape("key", key, "(B, S, M, H)", (batch, size, None, features))
    check_shape("value", value, "(B, S, M, V)", (batch, size, key.shape[2], None))
    kv_heads = key.shape[2]
    if kv_heads and heads % kv_heads:
        raise ValueError(
            "`key` must have a number of heads that divides that of `query`. Received: key of "
            f"shape {tuple(key.shape)}, query of shape {tuple(query.shape)}"
        )
    changes = {
        **_read_graph(tensors, options, call),
        **_read_hop_weights(tensors, options, arguments),
    }
    if changes:
        options = options.replace(**changes)
    for name, kind in (("padding_mask", "any"), ("segment_ids", "int")):
        tensors[name] = check_rows(name, tensors[name], query, kind)
    call.check(options, tensors["segment_ids"] is not None)
    tensors["seed"] = _read_seed(tensors["seed"]) if call.dropout > 0.0 else None
    return options, call, tensors


def _read_graph(tensors: dict[str, Any], options: Options, call: Call) -> dict[str, Any]:
    """Checks what the graph is built from, and returns what it says of the options."""
    query, graph = tensors["query"], tensors["graph"]
    batch, size, heads, features = query.shape
    kv_heads = tensors["key"].shape[2]
    given = [name for name in ("graph_query", "graph_key") if tensors[name] is not None]
    if len(given) == 1:
        other = "graph_key" if given == ["graph_query"] else "graph_query"
        raise ValueError(f"`{other}` must be given with `{given[0]}`. Received: {other}=None")
    graphs = heads
    if given:
        for name in given:
            tensors[name] = as_tensor(name, tensors[name])
        shape = tensors["graph_query"].shape
        check_shape(
            "graph_query", tensors["graph_query"], "(B, S, G, F)", (batch, size, None, None)
        )
        check_shape("graph_key", tensors["graph_key"], "(B, S, G, F)", shape)
        graphs, features = shape[2:]
        if graphs < 1 or (kv_heads and kv_heads % graphs):
            raise ValueError(
                "`graph_query` must have a number of graphs that divides the heads of `key`. "
                f"Received: graph_query of shape {tuple(shape)}, key of shape "
                f"{tuple(tensors['key'].shape)}"
            )
        if graph is not None:
            raise ValueError(
                f"`graph` must be `None` beside `graph_query`. Received: graph={graph!r}"
            )
    if graph is not None:
        check_fits(graph, query, kv_heads, options, call)
    kappa = tensors["concentration"]
    # A graph brings its own concentration, of any number of heads.
    if graph is None or not is_tensor(kappa):
        number = graphs if graph is None else None
        check_per_head("concentration", kappa, number, *CONCENTRATION_RANGE)
    check_per_head("lens_strength", tensors["lens_strength"], heads)
    for name in ("concentration", "lens_strength"):
        if is_tensor(tensors[name]):
            tensors[name] = as_tensor(name, tensors[name])
    if tensors["discoverability"] is not None:
        u = tensors["discoverability"] = as_tensor("discoverability", tensors["discoverability"])
        letters = "(G, F)" if given else "(N, H)"
        check_shape("discoverability", u, letters, (graphs, features))
    return {"graph_heads": graphs} if given else {}


def _read_hop_weights(
    tensors: dict[str, Any], options: Options, arguments: dict[str, Any]
) -> dict[str, Any]:
    """Checks theta, which takes the place of alpha, steps and gamma; returns what it changes."""
    strength = arguments.get("lens_strength", Options.lens_strength)
    if tensors["hop_weights"] is None:
        is_number = isinstance(strength, (int, float)) and strength != Options.lens_strength
        return {"lens_strength": strength} if is_number else {}
    weights = tensors["hop_weights"] = as_tensor("hop_weights", tensors["hop_weights"])
    batch, size, heads, _ = tensors["query"].shape
    last = weights.shape[-1] if len(weights.shape) else None
    check_shape(
        "hop_weights",
        weights,
        "(T + 1,), (N, T + 1) or (B, S, N, T + 1)",
        (last,),
        (heads, last),
        (batch, size, heads, last),
    )
    if not last:
        raise ValueError(
            "`hop_weights` must have at least the weight of no step. "
            f"Received: hop_weights of shape {tuple(weights.shape)}"
        )
    options.check_defaults("`hop_weights` takes its place", "alpha")
    if not (isinstance(strength, float) and strength == Options.lens_strength):
        raise ValueError(
            "`lens_strength` must be left at its default: `hop_weights` takes its place. "
            f"Received: lens_strength={strength!r}"
        )
    steps = last - 1
    if options.steps not in (steps, Options.steps):
        raise ValueError(
            "`steps` must be left out with `hop_weights`, or be one less than their number. "
            f"Received: steps={options.steps}, hop_weights of shape {tuple(weights.shape)}"
        )
    if options.fusion != "sum":
        raise ValueError(
            f'`fusion` must be "sum" with `hop_weights`. Received: fusion={options.fusion!r}'
        )
    if options.is_reciprocal and len(weights.shape) == 4:
        raise ValueError(
            "`reciprocal_beta` must be 1 where each token has hop weights of its own: the "
            "reciprocal mix needs the same for all. "
            f"Received: reciprocal_beta={options.reciprocal_beta}"
        )
    return {"steps": steps}


def _read_seed(seed: Any) -> Any:
    """The seed as an int or a tensor of shape `(2,)` or `(4,)`."""
    rule = "`seed` must be an int, a keras.random.SeedGenerator or an int tensor of shape (2,)"
    if isinstance(seed, keras.random.SeedGenerator):
        return seed.next()
    if isinstance(seed, int) and not isinstance(seed, bool):
        return seed
    if seed is None or isinstance(seed, (bool, float, str)):
        raise ValueError(f"{rule} when `dropout` > 0. Received: seed={seed!r}")
    seed = as_tensor("seed", seed, "int")
    if not any(len(seed.shape) == 1 and compatible(seed.shape, (n,)) for n in (2, 4)):
        raise ValueError(f"{rule} or (4,). Received: seed of shape {tuple(seed.shape)}")
    return seed
