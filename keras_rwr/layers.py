"""Drop-ins for Keras's attention layers, in self-attention."""

from typing import Any

import keras

from keras_rwr._self_attention import SelfAttention, check_stock_arguments
from keras_rwr.options import Options, Tuning

__all__ = ["RWRAttention", "RWRGroupedQueryAttention"]


@keras.saving.register_keras_serializable(package="keras_rwr")
class RWRAttention(SelfAttention, keras.layers.MultiHeadAttention):
    """Multi-head self-attention as a local window plus a random walk over a graph of tokens.

    For each head, with the projected query `q`, key `k` and value `v` of head size H, position i
    gives

    ```
    y_i      = LOCAL(i) + sum_t theta_t (P^t V)_i                    over t = 0 .. steps
    LOCAL(i) = sum_j softmax_j(q_i . k_j / sqrt(H) + b_j) v_j        over |i - j| <= window
    theta_t  = lens_strength * alpha * (1 - alpha)^t
    P_ij     = S_ij exp(b_j) / sum_k S_ik exp(b_k)
    ```

    where `P^t` says where a walker is that left token i and went t steps along the transition
    matrix P. With `stopping="restart"` it returns to i with probability `alpha` before each step;
    with `"learned"` and `"gated"` the weights `theta_t` of its steps are trained.

    S is W, or `(W + W^T) / 2` when `reversible`. `W_ij = f(c_ij)` weighs the edge from token i to
    token j by the cosine `c_ij` of `q_i` and `k_j`, with `f(c) = c - min(threshold, 0)` for cosine
    edges and `f(c) = exp(concentration * (c - 1))` for exponential ones, where c exceeds
    `threshold`. Token i has edges to the tokens of its window (itself included with `self_edges`)
    and to `topk` more, the `topk / neighbor_block` blocks of `neighbor_block` consecutive keys
    whose mean unit key is most similar to `q_i`. `b_j = clip(k_j . u, -8, 8)` with a trained vector
    u if `use_discoverability`, else 0. With `reversible` and `reciprocal_beta < 1`, `r = sum_t
    theta_t P^t` is mixed with the walk backwards: `reciprocal_beta * r + (1 - reciprocal_beta) *
    r_back`, where `r_back` is the transpose of r with rows scaled to the sum of r's.

    With `graph_heads` the graph has queries and keys of its own, of size `graph_dim`, projected
    from `query`: `graph_heads` graphs, each shared by an equal number of heads. Its key is
    convolved over the last `graph_convolution` tokens. It begins as an induction graph: a token
    links to the tokens that followed tokens like it. LOCAL takes no b then.

    Gradients are bounded by definition: they count the norm of a graph's query or key below 0.1 as
    0.1 and, for cosine edges, a row sum of `S_ij exp(b_j)` below 1 as 1.

    Memory and time are linear in the sequence length with `fusion="sum"`. With `window` at least
    the sequence length and `lens_strength=0` the layer equals `keras.layers.MultiHeadAttention`.

    Variables have the names and paths of `keras.layers.MultiHeadAttention`, so weights move both
    ways, through weights files where the layer is an attribute of a layer or model, and otherwise
    with `set_weights` or by path. (In a list of layers, such as a functional model's, Keras's
    weights files name each after its class, and loading the other's file raises.) What the walk
    trains belongs to the sublayer `walk`, see `extra_weights`; such weights keep their initial
    values when a file without them is loaded.

    Args:
        num_heads: Int. Number of attention heads, N.
        key_dim: Int. Size of each head for query and key, H.
        value_dim: Int. Size of each head for value. `None` means `key_dim`.
        dropout: Float in [0, 1). Dropout rate of LOCAL's probabilities.
        use_bias: Bool. Whether the projections have biases.
        output_shape: Shape of the output besides batch and sequence. `None` means the last
            dimension of `query`.
        attention_axes: `None` or 1: attention runs over the sequence.
        sliding_window: Must be `None`: use `window`, where `window = sliding_window - 1`.
        flash_attention: `None` or `False`: see `implementation`.
        kernel_initializer: Initializer of the projections' kernels.
        bias_initializer: Initializer of the projections' biases.
        kernel_regularizer: Regularizer of the projections' kernels.
        bias_regularizer: Regularizer of the projections' biases.
        activity_regularizer: Regularizer of the projections' outputs.
        kernel_constraint: Constraint of the projections' kernels.
        bias_constraint: Constraint of the projections' biases.
        use_gate: Bool. Whether a sigmoid projection of `query` gates the heads' outputs.
        seed: Int seed of the dropout.
        alpha: Float in (0, 1]. Restart probability. Defaults to 0.2.
        steps: Int >= 0. Number of walk steps. Defaults to 4.
        topk: Int >= 0, a multiple of `neighbor_block`. Tokens outside the window that each query
            links to. Defaults to 32.
        neighbor_block: Int >= 1. They come as blocks of this many consecutive keys; 1 means
            single tokens. At most `window + 1` in a causal call. Defaults to 16.
        window: Int >= 0. Half-width of the window, `|i - j| <= window`. Defaults to 128.
        threshold: `None` or float in [-1, 1). An edge needs a cosine above it. `None` means 0 for
            cosine edges and no cut for exponential ones.
        edge_weight: `"cosine"` (the default) or `"exponential"`.
        concentration: Float in [1, 64], or a list of one a graph. Initial sharpness of exponential
            edges, which is trained as its logarithm and kept in that range. Defaults to 20.
        reversible: Bool. Symmetrise the graph. Defaults to `False`.
        reciprocal_beta: Float in [0, 1]. Forward share of the reciprocal mix; used only when
            `reversible`. Defaults to 0.5.
        lens_strength: Float, or a list of one a head. Weight of the walk. Defaults to 0.3.
        trainable_lens: Bool. Whether `lens_strength` is only the initial value of a trained weight.
            Defaults to `False`.
        use_discoverability: Bool. Whether to train the vector u, zeros at first. Defaults to
            `False`.
        fusion: `"sum"` (the default) or `"softmax"`, which adds the walk to the logits of the
            window and of the `topk` most visited tokens outside of it. It takes time and memory
            quadratic in the sequence length: for analysis and short contexts.
        graph_heads: `None`: each head has a graph of its own, from its query and key. Int >= 1 that
            divides `num_heads`: so many graphs, each shared by an equal number of heads.
        graph_dim: Int >= 1. Size of the graph's queries and keys with `graph_heads`. Defaults to
            64.
        graph_convolution: Int >= 2. Width of the causal convolution of the graph's keys with
            `graph_heads`. Defaults to 4.
        self_edges: Bool. Whether a token is its own neighbour in the walk. Defaults to `True`.
        stopping: `"restart"` (the default): theta from `alpha` and `lens_strength`. `"learned"`:
            theta is trained, one for each head. `"gated"`: a trained projection of the token is
            added to it. With these two `alpha` and `lens_strength` are left at their defaults.
        block_size: `None` or int. Overrides an implementation's tile. Changes speed only.
        head_dim_pad: `None` or int. Pallas rounds the head size up to a multiple of it. Changes
            speed only.
        implementation: `None` for the fastest that supports the call, or the name of one, which is
            then used or raises `NotImplementedError`. A call with a cache has an implementation of
            its own.
        **kwargs: Arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        query: Tensor of shape `(B, S, dim)`.
        value: Tensor of shape `(B, S, dim)`, the same sequence as `query`.
        key: Tensor of shape `(B, S, dim)`, the same sequence as `query`. `None` means `value`.
            As in `keras.layers.MultiHeadAttention` the three may have different features (for
            example positions added to query and key only), but position j of each must be token
            j: walks step from keys on to queries.
        query_mask: Keras mask of `query`, of shape `(B, S)`. Usually attached to the tensor.
        value_mask: Keras mask of `value`, of shape `(B, S)`.
        key_mask: Keras mask of `key`, of shape `(B, S)`.
        attention_mask: Padding mask of shape `(B, S)`, `(B, 1, S)` or `(B, 1, 1, S)`, true at real
            tokens. (A mask of two dimensions is never `(T, S)`.) Outside compiled functions also a
            mask of shape `(B, S, S)` or `(B, 1, S, S)` that says padding, causality and packed
            documents and nothing else. A token that any of the masks marks as padding takes no
            part: nothing attends to it, no walk passes it, and its own output is that of the output
            projection at 0. Padding on the left changes no real output with single tokens
            (`neighbor_block=1`); blocks of keys move with it, so that others may be chosen.
        return_attention_scores: Bool. Whether to return the effective attention matrix as well. It
            has S² entries a head. Defaults to `False`.
        training: Bool. Whether dropout is active.
        use_causal_mask: Bool. Whether a token sees only tokens up to itself. Defaults to `False`.
        segment_ids: `None` or int tensor of shape `(B, S)`, the document of each token in a packed
            sequence: tokens of different documents do not see each other. Needs
            `neighbor_block=1` or `topk=0`.
        graph: `None` or a `keras_rwr.graph.SparseGraph` made earlier with the same options, so
            that layers or calls share one.
        cache: `None` or a cache from `empty_cache`: `query` then has shape `(B, T, dim)`, the next
            T tokens of sequences whose earlier tokens are in the cache. A causal call without
            masks, graph, scores or dropout.
        cache_update_index: Int or int tensor, the position of the first of these tokens. The int 0
            begins a sequence. Needed with a cache.

    Returns:
        attention_output: Tensor of shape `(B, S, E)`, where E is the last dimension of `query` or
            `output_shape`.
        attention_scores: (Only with `return_attention_scores=True`) tensor of shape
            `(B, N, S, S)`, the matrix A with heads' outputs `A v`, without dropout:
            `softmax LOCAL + lens_strength * r` for `fusion="sum"`.
        cache: (Only with a cache) the cache with the new tokens. On torch it is the same one,
            updated in place, where no gradient is recorded.

    Raises:
        ValueError: If an argument is outside its range, two do not fit together, the inputs are
            not one sequence of shape `(B, S, dim)`, or a mask is not a padding mask.
        TypeError: If an argument is of the wrong type.
        NotImplementedError: If the named `implementation` cannot run the call.

    Reference:
        - [Tong et al., 2006](https://doi.org/10.1109/ICDM.2006.70): random walk with restart
        - [Gasteiger et al., 2019](https://arxiv.org/abs/1810.05997): its propagation (APPNP)
        - [Wang et al., 2021](https://arxiv.org/abs/2009.14332): attention diffusion (MAGNA)
        - [Vaswani et al., 2017](https://arxiv.org/abs/1706.03762): multi-head attention

    Example:

    ```python
    x = keras.random.normal((2, 1000, 64))
    layer = keras_rwr.RWRAttention(num_heads=4, key_dim=16)
    y = layer(x, x, use_causal_mask=True)  # (2, 1000, 64)
    ```
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        dropout: float = 0.0,
        use_bias: bool = True,
        output_shape: Any = None,
        attention_axes: Any = None,
        sliding_window: int | None = None,
        flash_attention: bool | None = None,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        use_gate: bool = False,
        seed: int | None = None,
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
        trainable_lens: bool = False,
        use_discoverability: bool = False,
        fusion: str = "sum",
        graph_heads: int | None = None,
        graph_dim: int = 64,
        graph_convolution: int = 4,
        self_edges: bool = True,
        stopping: str = "restart",
        block_size: int | None = None,
        head_dim_pad: int | None = None,
        implementation: str | None = None,
        **kwargs: Any,
    ):
        options, tuning = Options.pick(locals()), Tuning.pick(locals())
        sizes = ("num_heads", "key_dim") + (() if value_dim is None else ("value_dim",))
        check_stock_arguments(locals(), sizes)
        super().__init__(
            num_heads,
            key_dim,
            value_dim=value_dim,
            dropout=dropout,
            use_bias=use_bias,
            output_shape=output_shape,
            attention_axes=attention_axes,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            activity_regularizer=activity_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            use_gate=use_gate,
            seed=seed,
            **kwargs,
        )
        self._add_walk(
            options,
            tuning,
            heads=num_heads,
            kv_heads=num_heads,
            key_dim=key_dim,
            value_dim=self._value_dim,
            dropout=dropout,
            kernel_initializer=kernel_initializer,
        )


@keras.saving.register_keras_serializable(package="keras_rwr")
class RWRGroupedQueryAttention(SelfAttention, keras.layers.GroupQueryAttention):
    """Grouped-query self-attention as a local window plus a random walk over a graph of tokens.

    It is to `keras.layers.GroupQueryAttention` what `keras_rwr.RWRAttention` is to
    `keras.layers.MultiHeadAttention`: each key and value head serves a group of query heads, as
    though it were repeated for each. With `graph_heads` the graph is shared by whole groups at
    least, and the values walk once for all heads of a group; without, each query head has a graph
    of its own, from its query and its group's key.

    Args:
        head_dim: Int. Size of each head, H.
        num_query_heads: Int. Number of query heads, N.
        num_key_value_heads: Int that divides `num_query_heads`. Number of key and value heads, M.
        dropout: Float in [0, 1). Dropout rate of LOCAL's probabilities.
        use_bias: Bool. Whether the projections have biases.
        sliding_window: Must be `None`: use `window`, where `window = sliding_window - 1`.
        flash_attention: `None` or `False`: see `implementation`.
        kernel_initializer: Initializer of the projections' kernels.
        bias_initializer: Initializer of the projections' biases.
        kernel_regularizer: Regularizer of the projections' kernels.
        bias_regularizer: Regularizer of the projections' biases.
        activity_regularizer: Regularizer of the projections' outputs.
        kernel_constraint: Constraint of the projections' kernels.
        bias_constraint: Constraint of the projections' biases.
        use_gate: Bool. Whether a sigmoid projection of `query` gates the heads' outputs.
        seed: Int seed of the dropout.
        alpha, steps, topk, neighbor_block, window, threshold, edge_weight, concentration,
            reversible, reciprocal_beta, lens_strength, trainable_lens, use_discoverability,
            fusion, graph_heads, graph_dim, graph_convolution, self_edges, stopping, block_size,
            head_dim_pad, implementation: As in `keras_rwr.RWRAttention`; its heads are the query
            heads here.
        **kwargs: Arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        As in `keras_rwr.RWRAttention`.

    Returns:
        attention_output: Tensor of the shape of `query`, `(B, S, dim)`.
        attention_scores: (Only with `return_attention_scores=True`) tensor of shape `(B, N, S, S)`.
        cache: (Only with a cache) the cache with the new tokens; it holds M key and value heads.

    Raises:
        ValueError: If an argument is outside its range, two do not fit together, the inputs are
            not one sequence of shape `(B, S, dim)`, or a mask is not a padding mask.
        TypeError: If an argument is of the wrong type.
        NotImplementedError: If the named `implementation` cannot run the call.

    Reference:
        - [Ainslie et al., 2023](https://arxiv.org/abs/2305.13245): grouped-query attention

    Example:

    ```python
    x = keras.random.normal((2, 1000, 64))
    layer = keras_rwr.RWRGroupedQueryAttention(16, num_query_heads=4, num_key_value_heads=2)
    y = layer(x, x, use_causal_mask=True)  # (2, 1000, 64)
    ```
    """

    def __init__(
        self,
        head_dim: int,
        num_query_heads: int,
        num_key_value_heads: int,
        dropout: float = 0.0,
        use_bias: bool = True,
        sliding_window: int | None = None,
        flash_attention: bool | None = None,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        use_gate: bool = False,
        seed: int | None = None,
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
        trainable_lens: bool = False,
        use_discoverability: bool = False,
        fusion: str = "sum",
        graph_heads: int | None = None,
        graph_dim: int = 64,
        graph_convolution: int = 4,
        self_edges: bool = True,
        stopping: str = "restart",
        block_size: int | None = None,
        head_dim_pad: int | None = None,
        implementation: str | None = None,
        **kwargs: Any,
    ):
        options, tuning = Options.pick(locals()), Tuning.pick(locals())
        sizes = ("head_dim", "num_query_heads", "num_key_value_heads")
        check_stock_arguments(locals(), sizes)
        if num_query_heads % num_key_value_heads:
            raise ValueError(
                "`num_key_value_heads` must divide `num_query_heads`. Received: "
                f"num_key_value_heads={num_key_value_heads}, num_query_heads={num_query_heads}"
            )
        super().__init__(
            head_dim,
            num_query_heads,
            num_key_value_heads,
            dropout=dropout,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            activity_regularizer=activity_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            use_gate=use_gate,
            seed=seed,
            **kwargs,
        )
        self._add_walk(
            options,
            tuning,
            heads=num_query_heads,
            kv_heads=num_key_value_heads,
            key_dim=head_dim,
            value_dim=head_dim,
            dropout=dropout,
            kernel_initializer=kernel_initializer,
        )
