"""GPT-2's transformer with RWR attention."""

import gc

import keras
import keras_hub

from keras_rwr.layer import RWRAttention
from keras_rwr.models import checkpointing
from keras_rwr.models import gpt2_conversion as conversion
from keras_rwr.models.gpt2_decoder import TransformerDecoder
from keras_rwr.models.layout import get_layout_map


@keras.saving.register_keras_serializable(package="keras_rwr")
def gelu_approximate(x):
    """GPT-2's activation."""
    return keras.activations.gelu(x, approximate=True)


@keras.saving.register_keras_serializable(package="keras_rwr")
class RWRGPT2Backbone(keras_hub.models.GPT2Backbone):
    """KerasHub's `GPT2Backbone` with `RWRAttention` in every layer.

    Weights have the names and paths of `GPT2Backbone`, so a stock `.weights.h5` file loads with
    `load_weights`; see also `from_backbone`. An option that adds weights (`use_discoverability`,
    `edge_weight="exponential"`, `trainable_lens`) leaves them at their initial values then.
    With `window` at least the context and `lens_strength=0` the outputs are those of
    `GPT2Backbone`.

    Made inside `keras.RematScope()`, it keeps only the inputs of each transformer layer for the
    backward pass, which runs the layer again: gradient checkpointing.

    Args:
        vocabulary_size: Int. Size of the token vocabulary.
        num_layers: Int. Number of transformer layers.
        num_heads: Int. Number of attention heads in each.
        hidden_dim: Int. Size of the hidden states.
        intermediate_dim: Int. Hidden size of the feedforward networks.
        dropout: Float in [0, 1). Dropout rate. Defaults to 0.1.
        max_sequence_length: Int. Number of positions. Defaults to 1024.
        dtype: String or `keras.DTypePolicy` of all layers.
        name: String.
        trainable: Bool.
        alpha: Restart probability; see `keras_rwr.RWRAttention` for this and all that follow.
        steps: Number of walk steps.
        topk: Tokens outside the window that each query links to.
        neighbor_block: They come in blocks of this many tokens; at most `window + 1`.
        window: Half-width of the local window.
        threshold: Cosine that an edge must exceed.
        edge_weight: `"cosine"` or `"exponential"`.
        concentration: Initial sharpness of exponential edges.
        reversible: Whether to symmetrise the graph.
        reciprocal_beta: Forward share of the reciprocal mix.
        lens_strength: Weight of the walk.
        trainable_lens: Whether to train it.
        use_discoverability: Whether to train a discoverability vector a head.
        fusion: `"sum"` or `"softmax"`.
        block_size: Overrides an implementation's tile.
        head_dim_pad: Rounds the head size up in kernels.
        implementation: Name of the implementation, or `None` for the fastest.

    Call arguments:
        inputs: Dict of `"token_ids"`, an int tensor of shape `(B, S)`, and `"padding_mask"`, of the
            same shape, true at real tokens.

    Returns:
        Tensor of shape `(B, S, hidden_dim)`.

    Raises:
        ValueError: If an argument is outside its range or two do not fit together.
        TypeError: If an argument is of the wrong type.
    """

    stock_cls = keras_hub.models.GPT2Backbone
    presets = conversion.StockPresets()

    def __init__(
        self,
        vocabulary_size,
        num_layers,
        num_heads,
        hidden_dim,
        intermediate_dim,
        dropout=0.1,
        max_sequence_length=1024,
        dtype=None,
        *,
        name=None,
        trainable=True,
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
    ):
        if hidden_dim % num_heads:
            raise ValueError(
                "`hidden_dim` must be a multiple of `num_heads`. "
                f"Received: hidden_dim={hidden_dim}, num_heads={num_heads}"
            )
        options = {
            "alpha": alpha,
            "steps": steps,
            "topk": topk,
            "neighbor_block": neighbor_block,
            "window": window,
            "threshold": threshold,
            "edge_weight": edge_weight,
            "concentration": concentration,
            "reversible": reversible,
            "reciprocal_beta": reciprocal_beta,
            "lens_strength": lens_strength,
            "trainable_lens": trainable_lens,
            "use_discoverability": use_discoverability,
            "fusion": fusion,
            "block_size": block_size,
            "head_dim_pad": head_dim_pad,
            "implementation": implementation,
        }
        conversion.check_options(options, max_sequence_length)

        self.token_embedding = keras.layers.ReversibleEmbedding(
            input_dim=vocabulary_size,
            output_dim=hidden_dim,
            embeddings_initializer=keras.initializers.RandomNormal(stddev=0.01),
            dtype=dtype,
            name="token_embedding",
        )
        self.position_embedding = keras_hub.layers.PositionEmbedding(
            initializer=keras.initializers.RandomNormal(stddev=0.02),
            sequence_length=max_sequence_length,
            dtype=dtype,
            name="position_embedding",
        )
        self.embeddings_add = keras.layers.Add(dtype=dtype, name="embeddings_add")
        self.embeddings_dropout = keras.layers.Dropout(
            dropout, dtype=dtype, name="embeddings_dropout"
        )
        self.transformer_layers = [
            TransformerDecoder(
                intermediate_dim=intermediate_dim,
                num_heads=num_heads,
                dropout=dropout,
                layer_norm_epsilon=1e-05,
                activation=gelu_approximate,
                kernel_initializer=keras.initializers.RandomNormal(stddev=0.02),
                normalize_first=True,
                rwr_options=options,
                dtype=dtype,
                name=f"transformer_layer_{i}",
            )
            for i in range(num_layers)
        ]
        self.layer_norm = keras.layers.LayerNormalization(
            axis=-1, epsilon=1e-05, dtype=dtype, name="layer_norm"
        )

        token_ids = keras.Input(shape=(None,), dtype="int32", name="token_ids")
        padding_mask = keras.Input(shape=(None,), dtype="int32", name="padding_mask")
        tokens = self.token_embedding(token_ids)
        positions = self.position_embedding(tokens)
        x = self.embeddings_add((tokens, positions))
        x = self.embeddings_dropout(x)
        for transformer_layer in self.transformer_layers:
            x = transformer_layer(x, decoder_padding_mask=padding_mask)
        x = self.layer_norm(x)
        # `GPT2Backbone.__init__` would make the stock layers: go on to its base class.
        keras_hub.models.Backbone.__init__(
            self,
            inputs={"token_ids": token_ids, "padding_mask": padding_mask},
            outputs=x,
            dtype=dtype,
            name=name,
            trainable=trainable,
        )

        checkpointing.leave_out(
            self,
            self.token_embedding,
            self.position_embedding,
            self.embeddings_add,
            self.embeddings_dropout,
            self.layer_norm,
        )

        self.vocabulary_size = vocabulary_size
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.hidden_dim = hidden_dim
        self.intermediate_dim = intermediate_dim
        self.dropout = dropout
        self.max_sequence_length = max_sequence_length
        self.rwr_options = options

    def get_config(self):
        return {**super().get_config(), **self.rwr_options}

    @classmethod
    def from_preset(cls, preset, load_weights=True, **kwargs):
        """Loads a GPT-2 preset, and converts it if it is a stock one.

        A stock preset gives a model with its weights and the RWR options asked for. A preset that
        `save_to_preset` of this class wrote loads as it was saved.

        Args:
            preset: String. A name in `RWRGPT2Backbone.presets` such as `"gpt2_base_en"`, a Kaggle
                handle `"kaggle://..."`, a Hugging Face handle `"hf://..."`, or a local folder.
            load_weights: Bool. Whether to load the weights, instead of drawing them.
            **kwargs: RWR options, such as `window`, and arguments of
                `keras_hub.models.GPT2Backbone.from_preset`, such as `dtype`.

        Returns:
            A `RWRGPT2Backbone`.

        Raises:
            ValueError: If KerasHub finds no GPT-2 there, or one with RWR attention and other
                options than those asked for.

        Example:

        ```python
        backbone = keras_rwr.models.RWRGPT2Backbone.from_preset("gpt2_base_en", window=64)
        ```
        """
        options, arguments = conversion.split_options(kwargs)
        dtype = conversion.quantized_dtype(preset)
        if dtype is not None:
            arguments.setdefault("dtype", dtype)
        backbone = conversion.load_preset(cls.stock_cls, preset, load_weights, arguments)
        if isinstance(backbone, RWRGPT2Backbone):
            conversion.check_same_options(backbone, options)
            return backbone
        new = cls.from_backbone(backbone, **options)
        # Models are cycles of references: free the weights of the stock one now.
        del backbone
        gc.collect()
        return new

    @classmethod
    def from_backbone(cls, backbone, **rwr_options):
        """Makes a backbone with RWR attention and the weights of a stock one.

        Args:
            backbone: A `keras_hub.models.GPT2Backbone`, which may be quantised.
            **rwr_options: Options of RWR attention, such as `window`. Other arguments are those of
                `backbone`; so are the options, where it has RWR attention already or is patched.

        Returns:
            A `RWRGPT2Backbone` with copies of the weights.

        Raises:
            TypeError: If `backbone` is not a `GPT2Backbone`.
            ValueError: If `backbone` has weights that the new one has not, such as LoRA's.

        Example:

        ```python
        stock = keras_hub.models.GPT2Backbone.from_preset("gpt2_base_en")
        backbone = keras_rwr.models.RWRGPT2Backbone.from_backbone(stock, edge_weight="exponential")
        ```
        """
        if not isinstance(backbone, keras_hub.models.GPT2Backbone):
            raise TypeError(
                "`backbone` must be a `keras_hub.models.GPT2Backbone`. "
                f"Received: backbone={backbone}"
            )
        patched = conversion.patched_options(backbone)
        new = cls.from_config({**backbone.get_config(), **patched, **rwr_options})
        conversion.copy_weights(backbone, new)
        return new

    def to_stock(self, drop_rwr_weights=False):
        """Makes a stock backbone with the weights of this one.

        Args:
            drop_rwr_weights: Bool. Whether to leave out the weights that only RWR attention has
                (`discoverability`, `concentration`, `lens_strength`). Defaults to `False`.

        Returns:
            A `keras_hub.models.GPT2Backbone` with copies of the weights. Its attention is the
            full one, so its outputs differ, unless `window` is at least the context and
            `lens_strength` 0.

        Raises:
            ValueError: If there are such weights and `drop_rwr_weights` is false, or LoRA's.
        """
        dropped = [weight.path for weight in self._rwr_weights()]
        if dropped and not drop_rwr_weights:
            raise ValueError(
                "A stock GPT-2 has no place for the weights of RWR attention: pass "
                f"`drop_rwr_weights=True` to leave them out. Received: weights {dropped}"
            )
        config = self.get_config()
        for name in self.rwr_options:
            del config[name]
        stock = self.stock_cls.from_config(config)
        conversion.copy_weights(self, stock, dropped)
        return stock

    def freeze_stock_weights(self):
        """Makes the weights that only RWR attention has the only trainable ones.

        They are `discoverability`, `concentration` and `lens_strength`, as the options have it.
        Compile the task afterwards, so that training takes note.

        Raises:
            ValueError: If the options give the model no such weight.
        """
        weights = self._rwr_weights()
        if not weights:
            raise ValueError(
                "Without weights of its own, RWR attention has nothing to train: use "
                "`use_discoverability=True`, `edge_weight='exponential'` or `trainable_lens=True`. "
                f"Received: rwr_options={self.rwr_options}"
            )
        self.trainable = False
        self._trainable = True
        for weight in weights:
            weight.trainable = True

    @staticmethod
    def get_layout_map(
        device_mesh, model_parallel_dim_name="model", data_parallel_dim_name="batch"
    ):
        """Layouts of the weights for `keras.distribution.ModelParallel`.

        Args:
            device_mesh: A `keras.distribution.DeviceMesh`.
            model_parallel_dim_name: String, the mesh axis that splits the weights.
            data_parallel_dim_name: String, the mesh axis that splits the batch.

        Returns:
            A `keras.distribution.LayoutMap`.
        """
        return get_layout_map(device_mesh, model_parallel_dim_name, data_parallel_dim_name)

    def _rwr_weights(self):
        layers = [layer for layer in self._flatten_layers() if isinstance(layer, RWRAttention)]
        return [weight for layer in layers for weight in layer._extra_weights()]
