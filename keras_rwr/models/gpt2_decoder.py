"""The decoder block of GPT-2 with RWR attention."""

from collections.abc import Callable, Mapping
from typing import Any

import keras
import keras_hub

from keras_rwr._cache import WalkCache
from keras_rwr.layers import RWRAttention
from keras_rwr.models import checkpointing

Tensor = Any

# The attention's parts that stay: their variables, LoRA, quantisation and random seeds with them.
_PARTS = ("_query_dense", "_key_dense", "_value_dense", "_dropout_layer", "_output_dense")


# Keras names the layers of a list in a weights file after their Python class, so the class keeps
# the name of KerasHub's; configurations tell the two apart by the registered name.
@keras.saving.register_keras_serializable(package="keras_rwr", name="RWRTransformerDecoder")
class TransformerDecoder(keras_hub.layers.TransformerDecoder):
    """KerasHub's `TransformerDecoder` without cross-attention, with `RWRAttention` inside.

    The attention takes the padding mask and the causal flag as they are: no `(B, S, S)` mask is
    made. Variables have the paths of KerasHub's block. A built block of KerasHub's becomes one of
    these by `convert`.

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

    def __init__(
        self,
        intermediate_dim: int,
        num_heads: int,
        rwr_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        # A configuration of a built block builds it inside the base class.
        self.rwr_options = {} if rwr_options is None else dict(rwr_options)
        super().__init__(intermediate_dim, num_heads, **kwargs)

    def rematerialized_call(self, layer_call: Callable, *args: Any, **kwargs: Any) -> Callable:
        """The call that gradient checkpointing makes of `call`; see `keras.RematScope`."""
        if checkpointing.checkpoints(self):
            return checkpointing.checkpointed(self, layer_call)
        return super().rematerialized_call(layer_call, *args, **kwargs)

    def build(self, decoder_sequence_shape: Any, encoder_sequence_shape: Any = None) -> None:
        _refuse(encoder_sequence_shape=encoder_sequence_shape)
        with checkpointing.blocks_only():
            super().build(decoder_sequence_shape)
            convert(self, self.rwr_options)

    def call(
        self,
        decoder_sequence: Tensor,
        encoder_sequence: Tensor = None,
        decoder_padding_mask: Tensor = None,
        decoder_attention_mask: Tensor = None,
        encoder_padding_mask: Tensor = None,
        encoder_attention_mask: Tensor = None,
        self_attention_cache: WalkCache | None = None,
        self_attention_cache_update_index: Any = None,
        cross_attention_cache: Tensor = None,
        cross_attention_cache_update_index: Any = None,
        use_causal_mask: bool = True,
        training: bool | None = None,
    ) -> Any:
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

    def empty_cache(self, batch_size: Any, length: int) -> WalkCache:
        """A cache without tokens; see `RWRAttention.empty_cache`."""
        return self._self_attention_layer.empty_cache(batch_size, length)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rwr_options": dict(self.rwr_options)}


def convert(decoder: keras_hub.layers.TransformerDecoder, rwr_options: Mapping[str, Any]) -> None:
    """Puts RWR attention into a built block of KerasHub's, in place of the attention there."""
    swap(decoder, TransformerDecoder, make_attention(decoder, rwr_options))
    decoder.rwr_options = dict(rwr_options)


def make_attention(
    decoder: keras_hub.layers.TransformerDecoder, rwr_options: Mapping[str, Any]
) -> RWRAttention:
    """Makes the RWR attention of a block that has KerasHub's.

    Args:
        decoder: Built block with KerasHub's attention.
        rwr_options: Dict of options.

    Returns:
        A built `RWRAttention` with the projections of that attention, which stay the same layers,
        and with weights of its own for the walk.
    """
    old = decoder._self_attention_layer
    # `implementation` takes the place of one; the other is set below, for all parts.
    left_out = ("flash_attention", "trainable")
    config = {name: x for name, x in old.get_config().items() if name not in left_out}
    new = RWRAttention(**{**config, "dtype": old.dtype_policy, **rwr_options})
    new._parent_path = old.path.rpartition("/")[0]
    shape = decoder._decoder_sequence_shape
    new.build(shape, shape)
    new.trainable = old.trainable
    for name in _PARTS:
        part = getattr(old, name)
        part.supports_masking = True
        new._tracker.replace_tracked_value("layers", getattr(new, name), part)
        setattr(new, name, part)
    refresh_torch(new)
    return new


def swap(decoder: keras.layers.Layer, cls: type, attention: keras.layers.Layer) -> None:
    """Gives a built block another attention, and the class whose `call` uses it."""
    # The methods differ and nothing else does, so the functional models around need no change.
    decoder.__class__ = cls
    decoder._tracker.replace_tracked_value("layers", decoder._self_attention_layer, attention)
    decoder._self_attention_layer = attention
    refresh_torch(decoder)


def refresh_torch(layer: keras.layers.Layer) -> None:
    """Brings up to date what torch takes for the parameters of a layer."""
    if keras.backend.backend() == "torch" and "_torch_params" in layer._modules:
        layer._track_variables()


def _refuse(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"`{name}` must be `None`: a decoder block with RWR attention is self-attention, "
                f"and takes `decoder_padding_mask` and `use_causal_mask`. "
                f"Received: {name}={value}"
            )
