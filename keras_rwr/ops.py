"""RWR attention as functions of query, key and value: validate, choose an implementation, call."""

import dataclasses

import keras
from keras import ops
from keras.src.backend import any_symbolic_tensors
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

from keras_rwr import dispatch, reference, sharding
from keras_rwr import graph as graphs
from keras_rwr.config import CONCENTRATION_RANGE, GRAPH_OPTIONS, RWRConfig, check_per_head
from keras_rwr.dropout import seed_words
from keras_rwr.tensors import check_shapes, compatible, key_bias, prepare


def rwr_attention(
    query,
    key,
    value,
    *,
    alpha=0.2,
    steps=4,
    topk=32,
    neighbor_block=16,
    window=128,
    threshold=None,
    edge_weight="cosine",
    concentration=20.0,
    reversible=False,
    reciprocal_beta=0.5,
    lens_strength=0.3,
    discoverability=None,
    fusion="sum",
    padding_mask=None,
    is_causal=False,
    dropout=0.0,
    seed=None,
    graph=None,
    block_size=None,
    head_dim_pad=None,
    implementation=None,
):
    """Windowed attention plus a random walk with restart over a graph of similar tokens.

    `y_i = LOCAL(i) + gamma * sum_j r_ij v_j` with the walk's weights `r_i = alpha * sum_t (1 -
    alpha)^t (P^t)_i` over t = 0 … steps, which sum to `1 - (1 - alpha)^(steps + 1)`. LOCAL is
    softmax attention over the keys within `window`; `P_ij` is proportional to the weight of the
    edge from i to j, see `keras_rwr.graph`.

    Args:
        query: Float tensor of shape `(B, S, N, H)`.
        key: Float tensor of shape `(B, S, N, H)`.
        value: Float tensor of shape `(B, S, N, V)`.
        alpha: Float in (0, 1]. Restart probability. Defaults to 0.2.
        steps: Int >= 0. Walk steps. Defaults to 4.
        topk: Int >= 0, a multiple of `neighbor_block`. Tokens outside the window that a query
            links to. Defaults to 32.
        neighbor_block: Int >= 1, at most `window + 1` when causal. They come in blocks of this
            many keys. Defaults to 16.
        window: Int >= 0. Half-width of the local window, `|i - j| <= window`. Defaults to 128.
        threshold: `None` or float in [-1, 1). An edge needs a cosine above it; `None` means 0 for
            cosine edges and no cut for exponential ones.
        edge_weight: `"cosine"` (the default) or `"exponential"`, `exp(concentration * (c - 1))`.
        concentration: Float in [1, 40], or one a head. Used by exponential edges only.
            Defaults to 20.
        reversible: Bool. Symmetrise the graph. Defaults to `False`.
        reciprocal_beta: Float in [0, 1]. Forward share of the mix of the walk with its reversal;
            used only when `reversible`. Defaults to 0.5.
        lens_strength: Float, or one a head. The walk's weight gamma. Defaults to 0.3.
        discoverability: `None` or tensor of shape `(N, H)`, the vector u: `b_j = clip(k_j u, -8,
            8)` is added to LOCAL's logits, `exp(b_j)` multiplies the walk's weights. A `graph`
            brings its own.
        fusion: `"sum"` (the default), or `"softmax"`: one softmax over the window and the `topk`
            tokens that the walk visits most. That one takes O(S^2) memory: for analysis and short
            contexts.
        padding_mask: `None` or tensor of shape `(B, S)`, true at real tokens. Outputs at padding
            are 0.
        is_causal: Bool. A token sees itself and its past only. Defaults to `False`.
        dropout: Float in [0, 1). Dropout rate of the softmax probabilities. Defaults to 0.
        seed: Int, `keras.random.SeedGenerator`, or int tensor of shape `(2,)`. Needed, and used,
            when `dropout > 0`. A tensor of shape `(4,)` ends in the position of the first batch
            entry and of the first head, for a call that is one piece of a larger one.
        graph: `None`, or a graph from `keras_rwr.graph.normalize_to_p` that was built with the
            same options, to walk on instead of building one.
        block_size: `None` or int >= 1. Queries in a tile; changes speed only.
        head_dim_pad: `None` or int >= 1. Kernels round the head size up to a multiple of it;
            changes speed only.
        implementation: `None` for the fastest that supports the call, or `"reference"`,
            `"portable"`, `"triton"`, `"pallas"`, `"xla"`, which never falls back.

    Returns:
        Tensor of shape `(B, S, N, V)` in the dtype of `query`.

    Raises:
        ValueError: If an argument is outside its range, or shapes do not fit.
        TypeError: If an argument is of the wrong type.
        NotImplementedError: If the named implementation cannot run the call.

    Reference:
        - [Tong et al., 2006](https://doi.org/10.1109/ICDM.2006.70): random walk with restart
        - [Klicpera et al., 2019](https://arxiv.org/abs/1810.05997): its propagation scheme, APPNP
        - [Wang et al., 2021](https://arxiv.org/abs/2009.14332): multi-hop attention, MAGNA
    """
    config = RWRConfig(
        alpha=alpha,
        steps=steps,
        topk=topk,
        neighbor_block=neighbor_block,
        window=window,
        threshold=threshold,
        edge_weight=edge_weight,
        reversible=reversible,
        reciprocal_beta=reciprocal_beta,
        fusion=fusion,
        is_causal=is_causal,
        dropout=dropout,
        block_size=block_size,
        head_dim_pad=head_dim_pad,
    )
    dispatch.check_implementation(implementation)
    if dropout > 0.0:
        seed = _check_seed(seed)
    tensors = {
        "lens_strength": lens_strength,
        "concentration": concentration,
        "discoverability": discoverability,
        "padding_mask": padding_mask,
    }
    others = {"seed": seed if dropout > 0.0 else None, "graph": graph}
    if any_symbolic_tensors((query, key, value, *tensors.values())):
        operation = RWRAttentionOperation(config, implementation)
        return operation.symbolic_call(query, key, value, **tensors, **others)
    return _call(config, implementation, query, key, value, **tensors, **others)


@keras.saving.register_keras_serializable(package="keras_rwr")
class RWRAttentionOperation(keras.Operation):
    """`rwr_attention` with its options fixed, as a node of a functional model.

    Args:
        config: `RWRConfig`, or a dict of its fields.
        implementation: `None` or the name of an implementation.
        name: `None` or string.
    """

    def __init__(self, config, implementation=None, *, name=None):
        super().__init__(name=name)
        self.config = RWRConfig(**config) if isinstance(config, dict) else config
        self.implementation = implementation

    def get_config(self):
        return {
            "config": dataclasses.asdict(self.config),
            "implementation": self.implementation,
            "name": self.name,
        }

    def call(
        self,
        query,
        key,
        value,
        lens_strength,
        concentration,
        discoverability=None,
        padding_mask=None,
        seed=None,
        graph=None,
    ):
        return _call(
            self.config,
            self.implementation,
            query,
            key,
            value,
            lens_strength,
            concentration,
            discoverability,
            padding_mask,
            seed,
            graph,
        )

    def compute_output_spec(
        self,
        query,
        key,
        value,
        lens_strength,
        concentration,
        discoverability=None,
        padding_mask=None,
        seed=None,
        graph=None,
    ):
        _check(query, key, value, lens_strength, concentration, discoverability, padding_mask)
        return keras.KerasTensor((*query.shape[:3], value.shape[-1]), dtype=query.dtype)


def _call(
    config,
    implementation,
    query,
    key,
    value,
    lens_strength,
    concentration,
    discoverability=None,
    padding_mask=None,
    seed=None,
    graph=None,
):
    """Checks tensors that hold numbers, and attends."""
    query, key, value = (ops.convert_to_tensor(x) for x in (query, key, value))
    if padding_mask is not None:
        padding_mask = ops.convert_to_tensor(padding_mask)
    if discoverability is not None:
        discoverability = ops.convert_to_tensor(discoverability)
    _check(query, key, value, lens_strength, concentration, discoverability, padding_mask)
    if graph is not None:
        check_graph(graph, query, config)
    if in_symbolic_scope():
        return ops.cast(ops.zeros_like(value), query.dtype)
    tensors = (query, key, value, lens_strength, concentration, discoverability, padding_mask)
    if graph is None and sharding.is_active():
        return _attend_over_devices(config, implementation, *tensors, seed)
    return _attend(config, implementation, *tensors, seed, graph)


def _check(query, key, value, lens_strength, concentration, discoverability, padding_mask):
    check_shapes(query, key, value, padding_mask)
    heads, head_size = query.shape[2:]
    check_per_head("lens_strength", lens_strength, heads)
    check_per_head("concentration", concentration, heads, *CONCENTRATION_RANGE)
    _check_discoverability(discoverability, heads, head_size)


def _attend(
    config,
    implementation,
    query,
    key,
    value,
    lens_strength,
    concentration,
    discoverability,
    padding_mask,
    seed,
    graph=None,
):
    """Chooses an implementation and neighbours, and runs checked tensors."""
    spec = dispatch.CallSpec(
        backend=keras.backend.backend(),
        device=dispatch.current_device(query),
        dtype=keras.backend.standardize_dtype(query.dtype),
        query_shape=tuple(query.shape),
        value_size=value.shape[-1],
        config=config,
        has_graph=graph is not None,
    )
    module = dispatch.load(dispatch.choose(spec, implementation))
    neighbors = None
    if graph is None and config.steps > 0:
        select = getattr(module, "select_neighbors", graphs.select_neighbors)
        neighbors = select(query, key, config, padding_mask)
    lens_strength, concentration = (
        ops.convert_to_tensor(x) if isinstance(x, keras.Variable) else x
        for x in (lens_strength, concentration)
    )
    return module.rwr_attention(
        query,
        key,
        value,
        config,
        lens_strength=lens_strength,
        concentration=concentration,
        discoverability=discoverability,
        padding_mask=padding_mask,
        seed=seed,
        neighbors=neighbors,
        graph=graph,
    )


def _attend_over_devices(config, implementation, query, key, value, *others):
    """`_attend` where each device has the batch entries and heads of its own."""
    lens_strength, concentration, discoverability, padding_mask, seed = others
    numbers = [ops.reshape(ops.convert_to_tensor(x), (-1,)) for x in (lens_strength, concentration)]
    positions = (None, None)
    if seed is not None:
        seed = seed_words(seed)
        starts = seed[2:] if seed.shape[0] == 4 else (0, 0)
        sizes = (query.shape[0], query.shape[2])
        positions = [
            start + ops.arange(size, dtype="int32")
            for start, size in zip(starts, sizes, strict=True)
        ]
    run = sharding.over_devices(
        _attend_on_device,
        ("bsnh", "bsnh", "bsnh", "n", "n", "nh", "bs", "w", "b", "n"),
        "bsnh",
        config,
        implementation,
    )
    return run(query, key, value, *numbers, discoverability, padding_mask, seed, *positions)


def _attend_on_device(config, implementation, *tensors):
    *tensors, seed, entries, heads = tensors
    if seed is not None:
        seed = ops.concatenate([seed[:2], entries[:1], heads[:1]])
    return _attend(config, implementation, *tensors, seed)


def attention_scores(
    query,
    key,
    *,
    alpha=0.2,
    steps=4,
    topk=32,
    neighbor_block=16,
    window=128,
    threshold=None,
    edge_weight="cosine",
    concentration=20.0,
    reversible=False,
    reciprocal_beta=0.5,
    lens_strength=0.3,
    discoverability=None,
    fusion="sum",
    padding_mask=None,
    is_causal=False,
    graph=None,
):
    """The dense matrix A with `rwr_attention(q, k, v) = A v`: softmax LOCAL plus gamma R.

    It takes O(S^2) memory and O(S^3) time: for analysis of short contexts. Nothing is dropped out.

    Args: as for `rwr_attention`.

    Returns:
        Tensor of shape `(B, N, S, S)`, in the dtype of `query`.

    Raises: as `rwr_attention`.
    """
    config = RWRConfig(
        alpha=alpha,
        steps=steps,
        topk=topk,
        neighbor_block=neighbor_block,
        window=window,
        threshold=threshold,
        edge_weight=edge_weight,
        reversible=reversible,
        reciprocal_beta=reciprocal_beta,
        fusion=fusion,
        is_causal=is_causal,
    )
    query, key = ops.convert_to_tensor(query), ops.convert_to_tensor(key)
    check_shapes(query, key, padding_mask=padding_mask)
    heads, head_size = query.shape[2:]
    check_per_head("lens_strength", lens_strength, heads)
    check_per_head("concentration", concentration, heads, *CONCENTRATION_RANGE)
    _check_discoverability(discoverability, heads, head_size)
    if graph is not None:
        check_graph(graph, query, config)
    matrix = reference.attention_matrix(
        query,
        key,
        config,
        lens_strength=lens_strength,
        concentration=concentration,
        discoverability=discoverability,
        padding_mask=padding_mask,
        graph=graph,
    )
    return ops.cast(matrix, query.dtype)


def token_importance(
    query,
    key,
    *,
    alpha=0.2,
    steps=4,
    topk=32,
    neighbor_block=16,
    window=128,
    threshold=None,
    edge_weight="cosine",
    concentration=20.0,
    reversible=False,
    discoverability=None,
    padding_mask=None,
    is_causal=False,
    graph=None,
):
    """How much the walks of all tokens visit each token, `sum_i r_ij / S`.

    The transpose of P is walked once from all tokens together, in O(S) memory. r is the forward
    walk, without the reciprocal mix, and S counts a sequence's real tokens, so that the
    importances of a sequence sum to `1 - (1 - alpha)^(steps + 1)`.

    Args: as for `rwr_attention`.

    Returns:
        Tensor of shape `(B, S, N)`, in float32 (float64 for a float64 query); 0 at padding.

    Raises: as `rwr_attention`.

    Reference:
        - [Page et al., 1999](http://ilpubs.stanford.edu:8090/422/): PageRank
    """
    config = RWRConfig(
        alpha=alpha,
        steps=steps,
        topk=topk,
        neighbor_block=neighbor_block,
        window=window,
        threshold=threshold,
        edge_weight=edge_weight,
        reversible=reversible,
        is_causal=is_causal,
    )
    query, key = ops.convert_to_tensor(query), ops.convert_to_tensor(key)
    check_shapes(query, key, padding_mask=padding_mask)
    heads, head_size = query.shape[2:]
    check_per_head("concentration", concentration, heads, *CONCENTRATION_RANGE)
    _check_discoverability(discoverability, heads, head_size)
    if graph is None:
        bias = None
        if discoverability is not None:
            bias = key_bias(key, discoverability)
        neighbors = graphs.select_neighbors(query, key, config, padding_mask)
        graph = graphs.transition(query, key, config, concentration, padding_mask, neighbors, bias)
    else:
        check_graph(graph, query, config)
    _, _, valid = prepare(query, key, padding_mask)
    real = ops.cast(valid, graph.local.dtype)
    start = real / ops.maximum(ops.sum(real, axis=2, keepdims=True), 1.0)
    batch, size, heads = ops.shape(query)[:3]
    start = graph.tiling.pad(ops.broadcast_to(start, (batch, heads, size, 1)))
    visits = start
    for _ in range(steps):
        visits = start + (1.0 - alpha) * graph.transposed_matmul(visits)
    visits = ops.where(valid, graph.tiling.cut(alpha * visits), 0.0)
    return ops.transpose(visits[..., 0], (0, 2, 1))


def check_graph(graph, query, config):
    """Checks that a caller's graph is normalised and fits the call.

    Raises:
        TypeError: If it is no `SparseGraph`.
        ValueError: If it is not normalised, or was built for other shapes or options.
    """
    if not isinstance(graph, graphs.SparseGraph):
        raise TypeError(f"`graph` must be a SparseGraph. Received: graph={graph!r}")
    if graph.stationary is None:
        raise ValueError(
            "`graph` must be normalised by `keras_rwr.graph.normalize_to_p`. "
            f"Received: graph={graph}"
        )
    for name in GRAPH_OPTIONS:
        built, asked = getattr(graph.config, name), getattr(config, name)
        if built != asked:
            raise ValueError(
                f"`graph` must be built with the call's options. Received: {name}={built!r} in the "
                f"graph, {name}={asked!r} in the call"
            )
    shape = (graph.local.shape[0], graph.tiling.size, graph.local.shape[1])
    if not compatible(shape, query.shape[:3]):
        raise ValueError(
            "`graph` must be built for the call's batch size, length and heads. "
            f"Received: graph of (B, S, N) = {shape}, query of shape {tuple(query.shape)}"
        )


def _check_discoverability(discoverability, heads, head_size):
    if discoverability is None:
        return
    shape = tuple(getattr(discoverability, "shape", ()))
    if shape != (heads, head_size):
        raise ValueError(
            f"`discoverability` must have shape (N, H) = {(heads, head_size)}. "
            f"Received: discoverability of shape {shape}"
        )


def _check_seed(seed):
    """The seed as an int or a tensor of shape `(2,)` or `(4,)`."""
    if isinstance(seed, keras.random.SeedGenerator):
        return seed.next()
    if seed is None or isinstance(seed, (bool, float, str)):
        raise ValueError(
            "`seed` must be an int, a keras.random.SeedGenerator or an int tensor of shape (2,) or "
            f"(4,) when `dropout` > 0. Received: seed={seed!r}"
        )
    if not isinstance(seed, int) and tuple(seed.shape) not in ((2,), (4,)):
        raise ValueError(
            "`seed` must be an int, a keras.random.SeedGenerator or an int tensor of shape (2,) or "
            f"(4,). Received: seed of shape {tuple(seed.shape)}"
        )
    return seed
