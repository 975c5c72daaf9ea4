"""Every family of `keras_rwr.models.convert` on small random models."""

import keras
import keras_hub
import numpy as np
import pytest
from gpt2_models import (
    JIT_COMPILE,
    LENGTH,
    MASK,
    QUANTIZE,
    VOCABULARY,
    greedy,
    make_batch,
    make_tokens,
    numpy,
    randomize,
)

from keras_rwr.data import pack
from keras_rwr.models import convert
from keras_rwr.models.families import FAMILIES

LLAMA = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 20,
}
MOE = {**LLAMA, "num_experts": 3, "top_k": 2}
GPT2 = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 20,
    "max_sequence_length": LENGTH,
}
GEMMA = {**LLAMA, "head_dim": 6}
SIZES = {
    "GPT2": GPT2,
    "OPT": GPT2,
    "GPTNeoX": {**GPT2, "rotary_percentage": 0.5},
    "Llama": LLAMA,
    "Llama3": LLAMA,
    "Mistral": {**LLAMA, "sliding_window": 64},
    "Mixtral": MOE,
    "Qwen": LLAMA,
    "QwenMoe": {**MOE, "moe_intermediate_dim": 10, "shared_expert_intermediate_dim": 8},
    "Qwen3": {**LLAMA, "head_dim": 6},
    "Qwen3Moe": {**MOE, "head_dim": 6, "moe_intermediate_dim": 10},
    "Phi3": {**LLAMA, "max_sequence_length": LENGTH},
    "SmolLM3": {
        "vocabulary_size": VOCABULARY,
        "hidden_dim": 16,
        "intermediate_dim": 20,
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_layer_enabled_list": [True, False],
        "layer_types": ["full_attention", "full_attention"],
        "mlp_bias": False,
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 64,
        "rope_theta": 1e4,
        "partial_rotary_factor": 1.0,
    },
    "Gemma": GEMMA,
    "Gemma3": {**GEMMA, "image_size": 16},
}
# The window holds everything and the walk is off: the stock model.
PLAIN = {"window": LENGTH, "topk": 0, "steps": 0, "lens_strength": 0.0, "stopping": "restart"}
SMALL = {"window": 3, "topk": 4, "steps": 2, "graph_dim": 5}
ENCODER = {**GPT2, "max_sequence_length": LENGTH}
ENCODERS = ("Bert", "DistilBert", "Roberta")
# Where a whole model is compiled, one family of each kind is enough.
KINDS = ("OPT", "GPTNeoX", "Llama", "Qwen3Moe", "Phi3", "SmolLM3", "Gemma3")
DECODERS = tuple(SIZES) if keras.backend.backend() == "torch" else KINDS
EVERY = pytest.mark.parametrize("family", DECODERS)


def test_every_family_is_tested():
    assert {*SIZES, *ENCODERS} == set(FAMILIES)


def stock_model(family, **arguments):
    keras.utils.set_random_seed(1)
    backbone = getattr(keras_hub.models, f"{family}Backbone")(**{**SIZES[family], **arguments})
    return getattr(keras_hub.models, f"{family}CausalLM")(
        backbone=randomize(backbone, 2), preprocessor=None
    )


def walking_model(family, **arguments):
    model = convert(stock_model(family), **{**SMALL, **arguments})
    randomize(model.backbone)
    return model


def assert_same(actual, expected, atol=1e-5):
    np.testing.assert_allclose(
        numpy(actual)[MASK > 0], numpy(expected)[MASK > 0], rtol=0, atol=atol
    )


def assert_generates_greedily(model):
    prompts = np.arange(LENGTH) < np.array([[4], [11], [7]])
    batch = {"token_ids": make_tokens() * prompts, "padding_mask": prompts.astype("int32")}
    expected = greedy(model, **batch)
    model.compile(sampler="greedy", jit_compile=JIT_COMPILE)
    # Gemma 3's task asks for images, which may be none.
    batch["images"] = np.zeros((len(MASK), 0, 16, 16, 3), "float32")
    generated = model.generate(batch, stop_token_ids=None)
    np.testing.assert_array_equal(generated["token_ids"], expected)


@pytest.mark.costly
@EVERY
def test_equals_the_stock_model_without_a_walk(family):
    stock = stock_model(family)
    expected = numpy(stock(make_batch()))
    scale = np.abs(expected).max()
    # Within a window over everything, also with hop weights as they begin.
    for options in (PLAIN, {"window": LENGTH, "layers": "all"}):
        model = convert(stock, **options)
        assert type(model).__name__ == f"RWR{family}CausalLM"
        assert_same(model(make_batch()) / scale, expected / scale)
    # And back.
    stock = model.to_stock(drop_rwr_weights=True)
    assert_same(stock(make_batch()), expected, atol=0)


@pytest.mark.costly
@EVERY
def test_causal_and_generates_what_full_passes_predict(family):
    model = walking_model(family)
    tokens = make_tokens()
    other = np.concatenate([tokens[:, :10], make_tokens(3)[:, 10:]], axis=1)
    full = np.ones_like(MASK)
    logits = [numpy(model({"token_ids": x, "padding_mask": full})) for x in (tokens, other)]
    np.testing.assert_array_equal(logits[0][:, :10], logits[1][:, :10])
    assert (logits[0][:, 10:] != logits[1][:, 10:]).any()

    assert_generates_greedily(model)


@pytest.mark.costly
@pytest.mark.parametrize("family", ["Llama", "Gemma3", "Phi3", "SmolLM3", "OPT"])
def test_other_layers_may_stay_stock(family):
    model = walking_model(family, others="stock")
    stock = stock_model(family)
    walking = [
        hasattr(model.backbone.family.attention_of(x), "walk")
        for x in model.backbone.transformer_layers
    ]
    assert walking == [False, True]
    assert type(model.backbone.transformer_layers[0]) is type(stock.backbone.transformer_layers[0])
    assert_generates_greedily(model)


@pytest.mark.costly
@EVERY
def test_saves_and_loads(family, tmp_path):
    model = walking_model(family, layers=[0])
    expected = numpy(model(make_batch()))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    assert type(loaded) is type(model)
    assert loaded.backbone.get_config() == model.backbone.get_config()
    assert_same(loaded(make_batch()), expected, atol=0)
    model.save_to_preset(tmp_path / "preset")
    loaded = type(model).from_preset(str(tmp_path / "preset"))
    assert_same(loaded(make_batch()), expected, atol=0)


@pytest.mark.costly
@pytest.mark.parametrize("family", ["Llama", "Qwen3Moe", "Mixtral", "Gemma3", "GPTNeoX"])
def test_trains_in_mixed_precision(family):
    # Mixtral's own loss mixes dtypes, which TensorFlow refuses.
    dtype = "float32" if family == "Mixtral" else "mixed_bfloat16"
    model = convert(stock_model(family, dtype=dtype), **SMALL)
    model.compile(
        keras.optimizers.Adam(1e-2),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=JIT_COMPILE,
    )
    data = (make_batch(), np.roll(make_tokens(), -1, axis=1), MASK)
    losses = [np.ravel(model.train_on_batch(*data))[0] for _ in range(4)]
    assert losses[-1] < losses[0]


def test_lora():
    model = walking_model("Llama")
    expected = numpy(model(make_batch()))
    model.backbone.enable_lora(2)
    assert_same(model(make_batch()), expected)
    trained = {weight.path for weight in model.backbone.trainable_weights}
    attention = "transformer_layer_1/self_attention"
    assert f"{attention}/query/lora_kernel_a" in trained
    assert f"{attention}/query/kernel" not in trained
    with pytest.raises(ValueError, match="`backbone` must be without LoRA"):
        model.to_stock(drop_rwr_weights=True)


@QUANTIZE
@pytest.mark.costly
@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
def test_int8(family, tmp_path):
    stock = stock_model(family)
    stock.backbone.quantize("int8")
    expected = numpy(stock(make_batch()))
    assert_same(convert(stock, **PLAIN)(make_batch()), expected)
    model = walking_model(family)
    expected = numpy(model(make_batch()))
    model.backbone.quantize("int8")
    output = numpy(model(make_batch()))
    # Inputs and weights of each projection are rounded to 1/127 of their largest value.
    assert_same(output, expected, atol=0.1 * np.abs(expected).max())
    model.save(tmp_path / "int8.keras")
    loaded = keras.models.load_model(tmp_path / "int8.keras", compile=False)
    assert_same(loaded(make_batch()), output, atol=0)


@pytest.mark.costly
def test_gradient_checkpointing():
    model = walking_model("Llama")
    with keras.RematScope(mode="full"):
        again = walking_model("Llama")
    assert_same(again(make_batch()), model(make_batch()))
    data = (make_batch(), np.roll(make_tokens(), -1, axis=1), MASK)
    for x in (model, again):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        x.compile(keras.optimizers.SGD(1.0), loss, jit_compile=JIT_COMPILE)
        x.train_on_batch(*data)
    for old, new in zip(model.weights, again.weights, strict=True):
        np.testing.assert_allclose(numpy(new), numpy(old), atol=1e-5)


def test_arguments_that_stock_configurations_forget(tmp_path):
    stock = stock_model("Llama", tie_word_embeddings=True)
    assert "tie_word_embeddings" not in stock.backbone.get_config()
    model = convert(stock, **PLAIN)
    assert_same(model(make_batch()), stock(make_batch()))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    assert_same(loaded(make_batch()), model(make_batch()), atol=0)
    assert_same(loaded.to_stock()(make_batch()), stock(make_batch()), atol=0)


@pytest.mark.parametrize(
    ("family", "arguments", "error", "message"),
    [
        ("Llama", {"layers": "each"}, ValueError, '`layers` must be "every second", "all" or'),
        ("Llama", {"layers": [2]}, ValueError, r"Received: layers=\[2\]"),
        ("Llama", {"others": "none"}, ValueError, "`rwr_others` must be one of 'local', 'stock'"),
        ("Llama", {"windows": 3}, TypeError, "Did you mean `window`"),
        ("Llama", {"graph_heads": 3}, ValueError, "`graph_heads` must divide"),
        ("Mixtral", {"packed": True}, ValueError, "`rwr_packed` must be false for this family"),
        ("Llama", {"packed": True, "others": "stock"}, ValueError, '`rwr_others` must be "local"'),
        ("Llama", {"packed": True, "neighbor_block": 2}, ValueError, "`neighbor_block` must be 1"),
    ],
)
def test_bad_arguments(family, arguments, error, message):
    with pytest.raises(error, match=message):
        convert(stock_model(family), **{**SMALL, **arguments})


def test_bad_models():
    with pytest.raises(TypeError, match=r"`model` must be a stock `CausalLM` or `Backbone`"):
        convert(keras.Sequential())
    with pytest.raises(TypeError, match=r"`model` must be a stock"):
        convert(walking_model("Llama"))
    with pytest.raises(ValueError, match=r"`attention_logit_soft_cap` must be off.*=50.0"):
        convert(stock_model("Gemma", attention_logit_soft_cap=50.0))


def make_encoder(family):
    keras.utils.set_random_seed(1)
    return randomize(getattr(keras_hub.models, f"{family}Backbone")(**ENCODER), 2)


def encoder_batch(family, tokens):
    batch = make_batch(tokens)
    return batch | {"segment_ids": 0 * MASK} if family == "Bert" else batch


def hidden_states(model, batch):
    output = model(batch)
    return numpy(output["sequence_output"] if isinstance(output, dict) else output)


@pytest.mark.costly
@pytest.mark.parametrize("family", ENCODERS)
def test_encoders(family, tmp_path):
    stock = make_encoder(family)
    batch = encoder_batch(family, make_tokens())
    expected = hidden_states(stock, batch)
    assert_same(hidden_states(convert(stock, **PLAIN), batch), expected)
    model = randomize(convert(stock, "all", **SMALL))
    output = hidden_states(model, batch)
    # A token sees what follows it, and no padding.
    tokens = make_tokens()
    tokens[:, -1] = tokens[:, -1] % (VOCABULARY - 1) + 1
    changed = hidden_states(model, encoder_batch(family, tokens))
    assert (changed[0] != output[0]).any(-1).all()
    np.testing.assert_array_equal(changed[1, :11], output[1, :11])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded).__name__ == f"RWR{family}Backbone"
    assert_same(hidden_states(loaded, batch), output, atol=0)


@pytest.mark.costly
def test_a_classifier_on_an_encoder():
    backbone = convert(make_encoder("Bert"), **SMALL)
    model = keras_hub.models.BertTextClassifier(backbone, num_classes=2, dropout=0.0)
    model.compile(
        keras.optimizers.Adam(3e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=JIT_COMPILE,
    )
    data = encoder_batch("Bert", make_tokens()), np.arange(len(MASK)) % 2
    losses = [model.train_on_batch(*data) for _ in range(6)]
    assert losses[-1] < losses[0]


@pytest.mark.costly
@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
def test_a_packed_batch_equals_its_documents_run_alone(family):
    rng = np.random.default_rng(5)
    documents = [rng.integers(1, VOCABULARY, n).tolist() for n in (9, 4, 20, 7, 2, 12)]
    x, y, sample_weight = pack(documents, LENGTH)
    assert len(x["token_ids"]) == 3
    model = walking_model(family, packed=True)
    packed = numpy(model(x))
    seen = []
    for row, numbers in enumerate(x["padding_mask"]):
        for number in range(1, numbers.max() + 1):
            places = np.flatnonzero(numbers == number)
            tokens = x["token_ids"][row, places]
            seen.append([*tokens.tolist(), y[row, places[-1]]])
            alone = {"token_ids": tokens[None], "padding_mask": np.ones((1, len(tokens)), "int32")}
            np.testing.assert_allclose(packed[row, places], numpy(model(alone))[0], atol=1e-4)
    assert sorted(seen) == sorted(documents)
    np.testing.assert_array_equal(sample_weight, x["padding_mask"] > 0)
    np.testing.assert_array_equal(
        type(model.backbone).from_config(model.backbone.get_config()).rwr_options["rwr_packed"],
        True,
    )
