"""The decoder block of GPT-2 with RWR attention."""

import keras
import keras_hub

from keras_rwr.layer import RWRAttention
from keras_rwr.models import checkpointing


# Keras names the layers of a list in a weights file after their Python class, so the class keeps
# the name of KerasHub's; configurations tell the two apart by the registered name.
@keras.saving.register_keras_serializable(package="keras_rwr", name="RWRTransformerDecoder")
class TransformerDecoder(keras_hub.layers.TransformerDecoder):
    """KerasHub's `TransformerDecoder` without cross-attention, with `RWRAttention` inside.

    The attention takes the padding mask and the causal flag as they are: no `(B, S, S)` mask is
    made. Variables have the paths of KerasHub's block.

    Args:
        intermediate_dim: Int. Hidden size of the feedforward network.
        num_heads: Int. Number of attention heads.
        rwr_options: `None` or dict of the arguments that `RWRAttention` has besides those of
            `keras.layers.MultiHeadAttention`, such as `{"window": 64}`.
        **kwargs: The other arguments of `keras_hub.layers.TransformerDecoder`.

    Call arguments:
        decoder_sequence: Tensor of shape `(B, S, dim)`.
        decoder_padding_mask: `None` or tensor of shape `(B, S)`, true at real tokens.
        self_attention_cache: `None` or a cache from `empty_cache`: `decoder_sequence` then holds
            the next tokens of sequences whose earlier tokens are in the cache.
        self_attention_cache_update_index: Int or int tensor, the position of the first of them.
        use_causal_mask: Bool. Whether a token sees only tokens up to itself. Defaults to `True`.
        training: Bool. Whether dropout is active.

    Returns:
        Tensor of shape `(B, S, dim)`; with a cache, a tuple of that and the updated cache.

    Raises:
        ValueError: If cross-attention or an attention mask is asked for.
    """

    def __init__(self, intermediate_dim, num_heads, rwr_options=None, **kwargs):
        # A configuration of a built block builds it inside the base class.
        self.rwr_options = {} if rwr_options is None else dict(rwr_options)
        super().__init__(intermediate_dim, num_heads, **kwargs)

    def rematerialized_call(self, layer_call, *args, **kwargs):
        """The call that gradient checkpointing makes of `call`; see `keras.RematScope`."""
        if checkpointing.checkpoints(self):
            return checkpointing.checkpointed(self, layer_call)
        return super().rematerialized_call(layer_call, *args, **kwargs)

    def build(self, decoder_sequence_shape, encoder_sequence_shape=None):
        _refuse(encoder_sequence_shape=encoder_sequence_shape)
        self._decoder_sequence_shape = decoder_sequence_shape
        hidden_dim = decoder_sequence_shape[-1]
        head_dim = hidden_dim // self.num_heads
        if head_dim == 0:
            raise ValueError(
                "`num_heads` must be at most the last dimension of `decoder_sequence`. "
                f"Received: num_heads={self.num_heads} for "
                f"decoder_sequence of shape {tuple(decoder_sequence_shape)}"
            )
        self._self_attention_layer = RWRAttention(
            num_heads=self.num_heads,
            key_dim=head_dim,
            dropout=self.dropout,
            kernel_initializer=self.kernel_initializer.clone(),
            bias_initializer=self.bias_initializer.clone(),
            dtype=self.dtype_policy,
            name="self_attention",
            **self.rwr_options,
        )
        self._self_attention_layer.build(decoder_sequence_shape, decoder_sequence_shape)
        self._self_attention_layer_norm = self._norm("self_attention_layer_norm")
        self._self_attention_layer_norm.build(decoder_sequence_shape)
        self._self_attention_dropout = self._dropout("self_attention_dropout")
        self._cross_attention_layer = None

        self._feedforward_intermediate_dense = self._dense(
            self.intermediate_dim, "feedforward_intermediate_dense", self.activation
        )
        self._feedforward_intermediate_dense.build(decoder_sequence_shape)
        self._feedforward_output_dense = self._dense(hidden_dim, "feedforward_output_dense")
        self._feedforward_output_dense.build((*decoder_sequence_shape[:-1], self.intermediate_dim))
        self._feedforward_layer_norm = self._norm("feedforward_layer_norm")
        self._feedforward_layer_norm.build(decoder_sequence_shape)
        self._feedforward_dropout = self._dropout("feedforward_dropout")
        checkpointing.leave_out(*self._flatten_layers(include_self=False))
        self.built = True

    def call(
        self,
        decoder_sequence,
        encoder_sequence=None,
        decoder_padding_mask=None,
        decoder_attention_mask=None,
        encoder_padding_mask=None,
        encoder_attention_mask=None,
        self_attention_cache=None,
        self_attention_cache_update_index=None,
        cross_attention_cache=None,
        cross_attention_cache_update_index=None,
        use_causal_mask=True,
        training=None,
    ):
        _refuse(
            encoder_sequence=encoder_sequence,
            decoder_attention_mask=decoder_attention_mask,
            encoder_padding_mask=encoder_padding_mask,
            encoder_attention_mask=encoder_attention_mask,
            cross_attention_cache=cross_attention_cache,
            cross_attention_cache_update_index=cross_attention_cache_update_index,
        )
        residual = x = decoder_sequence  # (B, S, dim)
        if self.normalize_first:
            x = self._self_attention_layer_norm(x)
        x = self._self_attention_layer(
            query=x,
            value=x,
            attention_mask=decoder_padding_mask,
            use_causal_mask=use_causal_mask,
            training=training,
            cache=self_attention_cache,
            cache_update_index=self_attention_cache_update_index,
        )
        if self_attention_cache is not None:
            x, self_attention_cache = x
        x = self._self_attention_dropout(x, training=training)
        x = x + residual
        if not self.normalize_first:
            x = self._self_attention_layer_norm(x)

        residual = x
        if self.normalize_first:
            x = self._feedforward_layer_norm(x)
        x = self._feedforward_intermediate_dense(x)
        x = self._feedforward_output_dense(x)
        x = self._feedforward_dropout(x, training=training)
        x = x + residual
        if not self.normalize_first:
            x = self._feedforward_layer_norm(x)
        return x if self_attention_cache is None else (x, self_attention_cache)

    def empty_cache(self, batch_size, length):
        """A cache without tokens; see `RWRAttention.empty_cache`."""
        return self._self_attention_layer.empty_cache(batch_size, length)

    def get_config(self):
        return {**super().get_config(), "rwr_options": dict(self.rwr_options)}

    def _norm(self, name):
        return keras.layers.LayerNormalization(
            epsilon=self.layer_norm_epsilon, dtype=self.dtype_policy, name=name
        )

    def _dropout(self, name):
        return keras.layers.Dropout(self.dropout, dtype=self.dtype_policy, name=name)

    def _dense(self, units, name, activation=None):
        return keras.layers.Dense(
            units,
            activation=activation,
            kernel_initializer=self.kernel_initializer.clone(),
            bias_initializer=self.bias_initializer.clone(),
            dtype=self.dtype_policy,
            name=name,
        )


def _refuse(**arguments):
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"`{name}` must be `None`: a decoder block with RWR attention is self-attention, "
                f"and takes `decoder_padding_mask` and `use_causal_mask`. "
                f"Received: {name}={value}"
            )
