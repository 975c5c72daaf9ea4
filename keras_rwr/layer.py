"""`RWRAttention`: a drop-in for `keras.layers.MultiHeadAttention` in self-attention."""

import dataclasses

import keras
from keras import ops

from keras_rwr import decoding, dispatch
from keras_rwr import ops as rwr_ops
from keras_rwr.config import CONCENTRATION_RANGE, RWRConfig, check_per_head
from keras_rwr.masks import check_mask, check_sequences, merge_masks

# What `rwr_attention` takes and the dense, deterministic `attention_scores` has no use for.
_NOT_FOR_SCORES = ("dropout", "block_size", "head_dim_pad")


@keras.saving.register_keras_serializable(package="keras_rwr")
class ClipToRange(keras.constraints.Constraint):
    """Keeps a weight inside a closed interval.

    Args:
        minimum: Float. Smallest value allowed.
        maximum: Float. Largest value allowed.
    """

    def __init__(self, minimum, maximum):
        self.minimum = minimum
        self.maximum = maximum

    def __call__(self, w):
        return ops.clip(w, self.minimum, self.maximum)

    def get_config(self):
        return {"minimum": self.minimum, "maximum": self.maximum}


@keras.saving.register_keras_serializable(package="keras_rwr")
class RWRAttention(keras.layers.MultiHeadAttention):
    """Multi-head self-attention as a local window plus a random walk with restart.

    For each head, with the projected query `q`, key `k` and value `v` of head size H, position i
    gives

    ```
    y_i     = LOCAL(i) + lens_strength * RWR(i)
    LOCAL(i) = sum_j softmax_j(q_i . k_j / sqrt(H) + b_j) v_j        over |i - j| <= window
    RWR(i)  = sum_j r_ij v_j
    r_i     = alpha * sum_{t = 0 .. steps} (1 - alpha)^t (P^t)_i
    P_ij    = S_ij exp(b_j) / sum_k S_ik exp(b_k)
    ```

    where `r_i` is the distribution of a walker that starts at token i, goes on along the
    transition matrix P, and returns to i with probability `alpha` before each step. S is W, or
    `(W + W^T) / 2` when `reversible`; `W_ij = f(c_ij)` weighs the edge from token i to token j by
    the cosine `c_ij` of `q_i` and `k_j`, with `f(c) = c - min(threshold, 0)` for cosine edges and
    `f(c) = exp(concentration * (c - 1))` for exponential ones, where c exceeds `threshold`. Token
    i has edges to the tokens of its window and to `topk` more, the `topk / neighbor_block` blocks
    of `neighbor_block` consecutive keys whose mean unit key is most similar to `q_i`.
    `b_j = clip(k_j . u, -8, 8)` with a trained vector u if `use_discoverability`, else 0. With
    `reversible` and `reciprocal_beta < 1`, `r` is mixed with the walk backwards:
    `reciprocal_beta * r + (1 - reciprocal_beta) * r_back`, where `r_back` is the transpose of r
    with rows scaled to the sum of r's.

    Memory and time are linear in the sequence length with `fusion="sum"`. With `window` at least
    the sequence length and `lens_strength=0` the layer equals `keras.layers.MultiHeadAttention`.

    Variables have the names and paths of `keras.layers.MultiHeadAttention`, so weights move both
    ways, through weights files where the layer is an attribute of a layer or model, and otherwise
    with `set_weights` or by path. (In a list of layers, such as a functional model's, Keras's
    weights files name each after its class, and loading the other's file raises.) An option that
    needs another weight adds it (`"discoverability"`, `"concentration"`, `"lens_strength"`); such
    weights keep their initial values when a file without them is loaded.

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
        concentration: Float in [1, 40], or a list of one a head. Initial sharpness of exponential
            edges, which is trained and kept in that range. Defaults to 20.
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
        block_size: `None` or int. Overrides an implementation's tile. Changes speed only.
        head_dim_pad: `None` or int. Kernels round the head size up to a multiple of it. Changes
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
        attention_mask: Padding mask of shape `(B, S)` or `(B, 1, S)`, true at real tokens. (A mask
            of two dimensions is never `(T, S)`.) A token that any of the masks marks as padding
            takes no part: nothing attends to it, no walk passes it, and its own output is that of
            the output projection at 0.
        return_attention_scores: Bool. Whether to return the effective attention matrix as well. It
            has S² entries a head. Defaults to `False`.
        training: Bool. Whether dropout is active.
        use_causal_mask: Bool. Whether a token sees only tokens up to itself. Defaults to `False`.
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
        num_heads,
        key_dim,
        value_dim=None,
        dropout=0.0,
        use_bias=True,
        output_shape=None,
        attention_axes=None,
        sliding_window=None,
        flash_attention=None,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        use_gate=False,
        seed=None,
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
        trainable_lens=False,
        use_discoverability=False,
        fusion="sum",
        block_size=None,
        head_dim_pad=None,
        implementation=None,
        **kwargs,
    ):
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
            dropout=dropout,
            block_size=block_size,
            head_dim_pad=head_dim_pad,
        )
        if attention_axes not in (None, 1, (1,), [1]):
            raise ValueError(
                "`attention_axes` must be `None` or 1, the sequence axis. "
                f"Received: attention_axes={attention_axes}"
            )
        if sliding_window is not None:
            raise ValueError(
                "`sliding_window` must be `None`: pass `window`, which is `sliding_window - 1`. "
                f"Received: sliding_window={sliding_window}"
            )
        if flash_attention not in (None, False):
            raise ValueError(
                "`flash_attention` must be `None` or `False`: `implementation` chooses the kernel. "
                f"Received: flash_attention={flash_attention}"
            )
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
        concentration, lens_strength = _plain(concentration), _plain(lens_strength)
        check_per_head("concentration", concentration, num_heads, *CONCENTRATION_RANGE)
        check_per_head("lens_strength", lens_strength, num_heads)
        dispatch.check_implementation(implementation)
        for name, value in (
            ("trainable_lens", trainable_lens),
            ("use_discoverability", use_discoverability),
        ):
            if not isinstance(value, bool):
                raise TypeError(f"`{name}` must be a bool. Received: {name}={value!r}")
        self._rwr_config = config
        self._concentration = concentration
        self._lens_strength = lens_strength
        self._trainable_lens = trainable_lens
        self._use_discoverability = use_discoverability
        self._implementation = implementation
        self.concentration = None
        self.lens_strength = None
        self.discoverability = None

    @property
    def rwr_config(self):
        """`RWRConfig` with the layer's options; causality is a matter of each call."""
        return self._rwr_config

    def get_config(self):
        options = dataclasses.asdict(self._rwr_config)
        del options["is_causal"]
        return {
            **super().get_config(),
            **options,
            "concentration": _plain(self._concentration),
            "lens_strength": _plain(self._lens_strength),
            "trainable_lens": self._trainable_lens,
            "use_discoverability": self._use_discoverability,
            "implementation": self._implementation,
        }

    def build(self, query_shape, value_shape, key_shape=None):
        check_sequences(query_shape, value_shape, key_shape)
        super().build(query_shape, value_shape, key_shape)
        # The projections see inputs that may carry a Keras mask, and keep their positions.
        for dense in (self._query_dense, self._key_dense, self._value_dense):
            dense.supports_masking = True
        if self._use_gate:
            self._gate_dense.supports_masking = True
        # These few numbers a head act through exponentials and sums over the whole sequence, so
        # they are never cast to the compute dtype.
        if self._use_discoverability:
            self.discoverability = self.add_weight(
                name="discoverability",
                shape=(self._num_heads, self._key_dim),
                initializer="zeros",
                autocast=False,
            )
        if self._rwr_config.edge_weight == "exponential":
            self.concentration = self.add_weight(
                name="concentration",
                shape=(self._num_heads,),
                initializer=keras.initializers.Constant(self._concentration),
                constraint=ClipToRange(*CONCENTRATION_RANGE),
                autocast=False,
            )
        if self._trainable_lens:
            self.lens_strength = self.add_weight(
                name="lens_strength",
                shape=(self._num_heads,),
                initializer=keras.initializers.Constant(self._lens_strength),
                autocast=False,
            )

    def call(
        self,
        query,
        value,
        key=None,
        query_mask=None,
        value_mask=None,
        key_mask=None,
        attention_mask=None,
        return_attention_scores=False,
        training=None,
        use_causal_mask=False,
        graph=None,
        cache=None,
        cache_update_index=None,
    ):
        if key is None:
            key = value
        masks = {
            "query_mask": query_mask,
            "value_mask": value_mask,
            "key_mask": key_mask,
            "attention_mask": attention_mask,
        }
        check_sequences(query.shape, value.shape, key.shape)
        config = dataclasses.replace(
            self._rwr_config,
            is_causal=bool(use_causal_mask),
            dropout=self._dropout if training else 0.0,
        )
        tensors = {
            "concentration": _first(self.concentration, self._concentration),
            "lens_strength": _first(self.lens_strength, self._lens_strength),
            "discoverability": self.discoverability,
        }
        if cache is None:
            padding_mask = merge_masks(query, **masks)
        else:
            _check_cached_call(
                config, cache_update_index, return_attention_scores, graph=graph, **masks
            )
        gate = self._gate_dense(query) if self._use_gate else None  # (B, S, N, value_dim)
        query = self._query_dense(query)  # (B, S, N, H)
        key = self._key_dense(key)  # (B, S, N, H)
        value = self._value_dense(value)  # (B, S, N, value_dim)
        if cache is None:
            output = rwr_ops.rwr_attention(
                query,
                key,
                value,
                padding_mask=padding_mask,
                graph=graph,
                seed=self._dropout_layer.seed_generator if config.dropout > 0 else None,
                implementation=self._implementation,
                **dataclasses.asdict(config),
                **tensors,
            )  # (B, S, N, value_dim)
        else:
            output, cache = decoding.attend(
                query, key, value, config, cache, cache_update_index, **tensors
            )
        if gate is not None:
            output = ops.multiply(output, gate)
        output = self._output_dense(output)
        if cache is not None:
            return output, cache
        if not return_attention_scores:
            return output
        options = dataclasses.asdict(config)
        for name in _NOT_FOR_SCORES:
            del options[name]
        scores = rwr_ops.attention_scores(
            query, key, padding_mask=padding_mask, graph=graph, **options, **tensors
        )  # (B, N, S, S)
        return output, ops.cast(scores, self.compute_dtype)

    def empty_cache(self, batch_size, length):
        """A cache for decoding, without tokens.

        Args:
            batch_size: Int, or scalar tensor.
            length: Int. Number of positions, prompt included.

        Returns:
            A `keras_rwr.decoding.WalkCache`, for the call argument `cache`.
        """
        return decoding.empty_cache(
            dataclasses.replace(self._rwr_config, is_causal=True),
            batch_size,
            length,
            self._num_heads,
            self._key_dim,
            self._value_dim,
            self.compute_dtype,
        )

    def compute_output_shape(self, query_shape, value_shape, key_shape=None):
        check_sequences(query_shape, value_shape, key_shape)
        return super().compute_output_shape(query_shape, value_shape, key_shape)

    def compute_output_spec(
        self,
        query,
        value,
        key=None,
        query_mask=None,
        value_mask=None,
        key_mask=None,
        attention_mask=None,
        return_attention_scores=False,
        training=None,
        use_causal_mask=False,
        graph=None,
        cache=None,
        cache_update_index=None,
    ):
        if cache is not None:
            raise ValueError(
                f"`cache` must be `None` in a symbolic call. Received: cache={type(cache).__name__}"
            )
        dataclasses.replace(self._rwr_config, is_causal=bool(use_causal_mask))
        masks = {
            "query_mask": query_mask,
            "value_mask": value_mask,
            "key_mask": key_mask,
            "attention_mask": attention_mask,
        }
        for name, mask in masks.items():
            check_mask(name, mask, query)
        return super().compute_output_spec(
            query, value, key, return_attention_scores=return_attention_scores
        )

    def save_own_variables(self, store):
        for variable in self._extra_weights():
            store[variable.name] = variable

    def load_own_variables(self, store):
        stored = set(store.keys())
        # A file of `MultiHeadAttention`, or of this layer without the options that add weights.
        if not stored:
            return
        expected = {variable.name for variable in self._extra_weights()}
        if stored != expected:
            raise ValueError(
                f"Layer '{self.name}' has the weights {sorted(expected)} besides its projections, "
                "and can load these or none. Check that `use_discoverability`, `edge_weight` and "
                f"`trainable_lens` are those of the saved layer. Received: {sorted(stored)}"
            )
        for variable in self._extra_weights():
            variable.assign(store[variable.name])

    def _extra_weights(self):
        weights = (self.discoverability, self.concentration, self.lens_strength)
        return [weight for weight in weights if weight is not None]


def _check_cached_call(config, cache_update_index, return_attention_scores, **others):
    """Checks the arguments beside `cache`."""
    if not config.is_causal:
        raise ValueError(
            "`use_causal_mask` must be true in cached decoding. Received: use_causal_mask=False"
        )
    if cache_update_index is None:
        raise ValueError(
            "`cache_update_index` must be the position of the first new token in cached decoding. "
            "Received: cache_update_index=None"
        )
    if config.dropout > 0.0:
        raise ValueError("`training` must be false in cached decoding. Received: training=True")
    if return_attention_scores:
        raise ValueError(
            "`return_attention_scores` must be false in cached decoding. "
            "Received: return_attention_scores=True"
        )
    for name, value in others.items():
        if value is not None:
            raise ValueError(
                f"`{name}` must be `None` in cached decoding: all that the cache holds is real. "
                f"Received: {name}={value}"
            )


def _plain(value):
    """Numbers, or sequences of one a head, as Python numbers that a config can hold."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return list(value) if isinstance(value, (list, tuple)) else value


def _first(variable, value):
    return value if variable is None else variable
