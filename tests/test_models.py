"""GPT-2 with RWR attention: against the stock model, training, generation, saving."""

import functools

import keras
import keras_hub
import numpy as np
import pytest
from gpt2_models import (
    BATCH,
    JIT_COMPILE,
    LENGTH,
    MASK,
    ONE_LAYER,
    PLAIN,
    QUANTIZE,
    R5_WEIGHTS,
    SIZES,
    SMALL,
    STEPS,
    VOCABULARY,
    greedy,
    make_batch,
    make_tokens,
    numpy,
    randomize,
    walk_paths,
)
from helpers import compiled
from keras import ops

from keras_rwr.models import (
    RWRGPT2Backbone,
    RWRGPT2CausalLM,
    checkpointing,
    conversion,
    patch_gpt2_with_rwr,
)


def stock_backbone(**arguments):
    return randomize(keras_hub.models.GPT2Backbone(**{**SIZES, **arguments}))


def rwr_backbone(**arguments):
    return randomize(RWRGPT2Backbone(**{**SIZES, **SMALL, **arguments}))


def assert_same(a, b, atol=1e-5):
    np.testing.assert_allclose(numpy(a), numpy(b), rtol=0, atol=atol)


# --- as the stock model --------------------------------------------------------------------------


def test_stock_weight_files_load_and_give_the_stock_logits(tmp_path):
    stock = keras_hub.models.GPT2CausalLM(stock_backbone())
    model = RWRGPT2CausalLM(RWRGPT2Backbone(**SIZES, **PLAIN))
    stock.backbone.save_weights(tmp_path / "backbone.weights.h5")
    model.backbone.load_weights(tmp_path / "backbone.weights.h5")
    expected, logits = numpy(stock(make_batch())), numpy(model(make_batch()))
    assert logits.shape == (BATCH, LENGTH, VOCABULARY)
    assert_same(logits[MASK > 0], expected[MASK > 0])
    # And back.
    randomize(model, seed=3).backbone.save_weights(tmp_path / "rwr.weights.h5")
    stock.backbone.load_weights(tmp_path / "rwr.weights.h5")
    expected, logits = numpy(model(make_batch())), numpy(stock(make_batch()))
    assert_same(logits[MASK > 0], expected[MASK > 0])


@pytest.mark.filterwarnings("ignore:Skipping nested container")
def test_files_of_a_stock_task_are_refused(tmp_path):
    # Keras names a task's backbone after its class there.
    keras_hub.models.GPT2CausalLM(stock_backbone()).save_weights(tmp_path / "task.weights.h5")
    with pytest.raises(ValueError, match="could not be loaded"):
        RWRGPT2CausalLM(rwr_backbone()).load_weights(tmp_path / "task.weights.h5")


def test_weights_have_the_stock_paths():
    stock, model = stock_backbone(), rwr_backbone()
    assert [w.path for w in model.weights] == [w.path for w in stock.weights]
    extras = {"edge_weight": "exponential", "use_discoverability": True, "trainable_lens": True}
    names = ("discoverability", "lens_strength", "log_concentration")
    for options, expected in (
        (extras, walk_paths(names, (0, 1))),
        ({**STEPS["R5"], "rwr_layers": [1]}, walk_paths(R5_WEIGHTS, (1,))),
    ):
        paths = {weight.path for weight in rwr_backbone(**options).weights}
        assert paths == {weight.path for weight in stock.weights} | expected


def test_stock_weight_files_load_beside_extra_weights(tmp_path):
    stock = stock_backbone()
    stock.save_weights(tmp_path / "stock.weights.h5")
    model = RWRGPT2Backbone(**SIZES, **STEPS["R5"], use_discoverability=True)
    before = {w.path: numpy(w) for w in model.weights}
    model.load_weights(tmp_path / "stock.weights.h5")
    expected = {**before, **{w.path: numpy(w) for w in stock.weights}}
    for weight in model.weights:
        np.testing.assert_array_equal(numpy(weight), expected[weight.path])


def test_from_backbone():
    stock = stock_backbone(dropout=0.2, dtype="mixed_bfloat16", name="mine")
    model = RWRGPT2Backbone.from_backbone(stock, **STEPS["R4"])
    assert (model.dropout, model.name) == (0.2, "mine")
    assert model.dtype_policy.name == "mixed_bfloat16"
    assert model.rwr_options["window"] == 3
    weights = {w.path: numpy(w) for w in model.weights}
    for weight in stock.weights:
        np.testing.assert_array_equal(weights[weight.path], numpy(weight))
    # From one set of options to another, as far as there is a place for each weight.
    again = RWRGPT2Backbone.from_backbone(model, window=5)
    assert again.rwr_options == {**model.rwr_options, "window": 5}
    with pytest.raises(ValueError, match=r"no weights but those of .*layer_1/self_attention/walk"):
        RWRGPT2Backbone.from_backbone(model, rwr_layers=[0])
    with pytest.raises(TypeError, match="`backbone` must be a `keras_hub"):
        RWRGPT2Backbone.from_backbone(keras.Sequential())
    stock.enable_lora(2)
    with pytest.raises(ValueError, match=r"must be without LoRA. Save it with `save_to_preset`"):
        RWRGPT2Backbone.from_backbone(stock)


def test_layers_that_do_not_walk_are_local_alone():
    model = rwr_backbone(**STEPS["R5"], rwr_layers=[-1])
    local, walking = (block._self_attention_layer for block in model.transformer_layers)
    assert not local.options.walks
    assert local.options.window == walking.options.window == 3
    assert walking.options.stopping == "gated"
    # Without any that walks, a token sees no further than its windows reach.
    model = rwr_backbone(**STEPS["R5"], rwr_layers=())
    assert conversion.walk_weights(model) == []
    tokens = make_tokens()
    other = np.concatenate([make_tokens(6)[:, :2], tokens[:, 2:]], axis=1)
    expected, output = (numpy(model(make_batch(x)))[0] for x in (tokens, other))
    reach = 1 + 2 * 3
    np.testing.assert_array_equal(output[reach + 1 :], expected[reach + 1 :])
    assert (output[: reach + 1] != expected[: reach + 1]).any(-1).all()


@pytest.mark.costly
@pytest.mark.parametrize("step", STEPS)
def test_the_model_is_causal_and_blind_to_padding(step):
    model = rwr_backbone(**STEPS[step])
    tokens = make_tokens()
    expected = numpy(model(make_batch()))
    other = np.where(MASK > 0, tokens, make_tokens(5))
    output = numpy(model({"token_ids": other, "padding_mask": MASK}))
    np.testing.assert_array_equal(output[MASK > 0], expected[MASK > 0])
    for seen in (1, 8, 14):
        other = np.concatenate([tokens[:, :seen], make_tokens(6)[:, seen:]], axis=1)
        output = numpy(model(make_batch(other)))
        real = MASK[:, :seen] > 0
        np.testing.assert_array_equal(output[:, :seen][real], expected[:, :seen][real])


# --- training ------------------------------------------------------------------------------------


def test_fit_lowers_the_loss():
    model = RWRGPT2CausalLM(RWRGPT2Backbone(**ONE_LAYER, **STEPS["R5"]))
    model.compile(
        keras.optimizers.Adam(3e-3),
        weighted_metrics=[keras_hub.metrics.Perplexity(from_logits=True, name="perplexity")],
    )
    tokens = np.tile(np.arange(1, 5), (BATCH, 5))  # (B, 20)
    x = {"token_ids": tokens[:, :LENGTH] * MASK, "padding_mask": MASK}
    y = tokens[:, 1:] * MASK
    before = [numpy(weight) for weight in model.trainable_weights]
    history = model.fit(
        x, y, sample_weight=MASK.astype("float32"), epochs=8, shuffle=False, verbose=0
    ).history
    assert np.isfinite(history["loss"]).all()
    assert history["loss"][-1] < 0.9 * history["loss"][0]
    assert history["perplexity"][-1] < 0.8 * history["perplexity"][0]
    for weight, old in zip(model.trainable_weights, before, strict=True):
        assert (numpy(weight) != old).any(), weight.path
    loss, perplexity = model.evaluate(x, y, sample_weight=MASK.astype("float32"), verbose=0)
    total = loss * MASK.size / MASK.sum()  # Keras divides a weighted loss by the batch's size
    np.testing.assert_allclose(perplexity, np.exp(total), rtol=1e-3)


@pytest.mark.costly
def test_mixed_precision():
    exact = RWRGPT2Backbone(**ONE_LAYER, **STEPS["R5"])
    model = RWRGPT2Backbone(**ONE_LAYER, **STEPS["R5"], dtype="mixed_bfloat16")
    model.set_weights([numpy(weight) for weight in exact.weights])
    output = model(make_batch())
    assert keras.backend.standardize_dtype(output.dtype) == "bfloat16"
    assert {weight.dtype for weight in model.weights} == {"float32"}
    expected = numpy(exact(make_batch()))[MASK > 0]
    # Activations of order 1 rounded to 2^-9 in each of about six layers.
    assert_same(numpy(ops.cast(output, "float32"))[MASK > 0], expected, atol=0.1)

    task = RWRGPT2CausalLM(model)
    task.compile(sampler="greedy")
    assert np.isfinite(fit(task)).all()


def fit(task, **arguments):
    history = task.fit(make_batch(), make_tokens(), shuffle=False, verbose=0, **arguments)
    return history.history["loss"]


def test_lora_trains():
    model = RWRGPT2CausalLM(rwr_backbone(num_layers=1, implementation="reference"))
    expected = numpy(model(make_batch()))
    model.backbone.enable_lora(2)
    assert_same(model(make_batch()), expected)
    names = {weight.path for weight in model.trainable_weights}
    layers = [f"transformer_layer_0/self_attention/{name}" for name in ("query", "value")]
    parts = ("bias", "lora_kernel_a", "lora_kernel_b")
    assert names == {f"{layer}/{part}" for layer in layers for part in parts}
    before = {weight.path: numpy(weight) for weight in model.weights}
    model.compile(keras.optimizers.Adam(1e-2), jit_compile=JIT_COMPILE)
    losses = fit(model, epochs=3)
    assert losses[-1] < losses[0]
    changed = {w.path for w in model.weights if (numpy(w) != before[w.path]).any()}
    assert changed == names


@pytest.mark.costly
@QUANTIZE
def test_int8(tmp_path):
    model = RWRGPT2CausalLM(rwr_backbone(topk=0, num_layers=1))
    model.compile(sampler="greedy")
    expected = numpy(model(make_batch()))[MASK > 0]
    model.backbone.quantize("int8")
    attention = model.backbone.transformer_layers[0]._self_attention_layer
    for weight in (attention.query_dense.kernel, model.backbone.token_embedding.embeddings):
        assert keras.backend.standardize_dtype(weight.dtype) == "int8"
    output = model.predict_on_batch(make_batch())[MASK > 0]
    # Inputs and weights of each projection rounded to 1/127 of their largest value.
    assert_same(output, expected, atol=0.1 * np.abs(expected).max())
    model.save(tmp_path / "int8.keras")
    loaded = keras.models.load_model(tmp_path / "int8.keras", compile=False)
    loaded.compile()
    assert_same(loaded.predict_on_batch(make_batch())[MASK > 0], output, atol=0)

    mask = (np.arange(LENGTH) < np.array([[16], [15], [17]])).astype("int32")
    prompt = {"token_ids": make_tokens() * mask, "padding_mask": mask}
    tokens = model.generate(dict(prompt), stop_token_ids=None)["token_ids"]
    np.testing.assert_array_equal(tokens * mask, prompt["token_ids"])
    np.testing.assert_array_equal(tokens, greedy(model.predict_on_batch, **prompt))


@pytest.fixture
def quick_compilation(monkeypatch):
    """On torch, Keras has `torch.compile` trace its own code too, minutes with the defaults."""
    if keras.backend.backend() != "torch":
        yield
        return
    import torch

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=1):
        yield


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.usefixtures("quick_compilation")
def test_jit_compiled_training():
    model = RWRGPT2CausalLM(
        rwr_backbone(**{**STEPS["R4"], **ONE_LAYER}, implementation="reference", dropout=0.0)
    )
    state = model.get_weights()
    losses, weights = [], []
    for jit_compile in (True, False):
        model.set_weights(state)
        model.compile(keras.optimizers.SGD(0.1), jit_compile=jit_compile)
        losses.append(fit(model))
        weights.append(model.get_weights())
    np.testing.assert_allclose(*losses, rtol=1e-5)
    for weight, other in zip(*weights, strict=True):
        np.testing.assert_allclose(weight, other, rtol=0, atol=1e-5)


def test_gradient_checkpointing(monkeypatch):
    names, losses, weights = [], [], []
    checkpointed = checkpointing.checkpointed

    def noted(layer, call):
        names.append((mode, layer.name))
        return checkpointed(layer, call)

    monkeypatch.setattr(checkpointing, "checkpointed", noted)
    for mode in (None, "full"):
        keras.utils.set_random_seed(1)
        with keras.RematScope(mode):
            model = RWRGPT2CausalLM(rwr_backbone(num_layers=1, dropout=0.3, **STEPS["R4"]))
        model.compile(keras.optimizers.SGD(0.1), jit_compile=JIT_COMPILE)
        losses.append(fit(model, epochs=2))
        weights.append(model.get_weights())
    assert set(names) == {("full", "transformer_layer_0")}
    # The second run of each block drops what the first one did.
    np.testing.assert_allclose(*losses, rtol=1e-5)
    for weight, other in zip(*weights, strict=True):
        np.testing.assert_allclose(weight, other, rtol=0, atol=1e-5)


def test_freezing_all_but_the_rwr_weights():
    options = {**STEPS["R5"], "implementation": "reference"}
    model = RWRGPT2CausalLM(rwr_backbone(**options, num_layers=1))
    model.backbone.freeze_stock_weights()
    names = walk_paths(R5_WEIGHTS)
    assert {weight.path for weight in model.trainable_weights} == names
    before = {weight.path: numpy(weight) for weight in model.weights}
    model.compile(keras.optimizers.Adam(1e-2), jit_compile=JIT_COMPILE)
    fit(model)
    changed = {w.path for w in model.weights if (numpy(w) != before[w.path]).any()}
    assert changed == names
    with pytest.raises(ValueError, match=r"use an option that adds some, .* Received: rwr_opt"):
        rwr_backbone().freeze_stock_weights()


# --- generation ----------------------------------------------------------------------------------


PROMPT_MASK = (np.arange(LENGTH) < np.array([[5], [3], [9]])).astype("int32")


def test_greedy_generation_is_the_argmax_of_the_full_forward_pass():
    # A step in each layer.
    sizes = {**SIZES, "num_layers": len(STEPS)}
    model = keras_hub.models.GPT2CausalLM(keras_hub.models.GPT2Backbone(**sizes))
    for layer, options in enumerate(STEPS.values()):
        patch_gpt2_with_rwr(model, layers=[layer], **options)
    randomize(model, 2).compile(sampler="greedy")
    prompt = make_tokens() * PROMPT_MASK
    output = model.generate({"token_ids": prompt, "padding_mask": PROMPT_MASK}, stop_token_ids=None)
    expected = greedy(model.predict_on_batch, prompt, PROMPT_MASK)
    np.testing.assert_array_equal(output["token_ids"], expected)
    np.testing.assert_array_equal(expected * PROMPT_MASK, prompt)
    assert len(np.unique(expected[PROMPT_MASK == 0])) > 3


class FullPasses(RWRGPT2CausalLM):
    """Generates by a forward pass over all tokens for each token; its cache are the tokens."""

    def empty_cache(self, batch_size, length):
        return (ops.zeros((batch_size, length), dtype="int32"),)

    def call_with_cache(self, token_ids, cache, cache_update_index):
        start = (0, cache_update_index)
        tokens = ops.slice_update(cache[0], start, ops.cast(token_ids, "int32"))
        hidden_states = self.backbone({"token_ids": tokens, "padding_mask": ops.ones_like(tokens)})
        new = (*ops.shape(token_ids), SIZES["hidden_dim"])
        hidden_states = ops.slice(hidden_states, (*start, 0), new)
        logits = self.backbone.token_embedding(hidden_states, reverse=True)
        return logits, hidden_states, (tokens,)


@pytest.mark.costly
@pytest.mark.parametrize(
    "sampler",
    [
        keras_hub.samplers.RandomSampler(seed=3),
        keras_hub.samplers.TopKSampler(k=5, seed=3),
        keras_hub.samplers.TopPSampler(p=0.7, k=9, seed=3),
        keras_hub.samplers.BeamSampler(num_beams=2),
        keras_hub.samplers.ContrastiveSampler(k=3, alpha=0.4),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_samplers_generate_what_full_passes_give(sampler):
    backbone = rwr_backbone(**{**STEPS["R5"], **ONE_LAYER})
    prompt = {"token_ids": make_tokens() * PROMPT_MASK, "padding_mask": PROMPT_MASK}
    outputs = []
    for cls in (RWRGPT2CausalLM, FullPasses):
        task = cls(backbone)
        task.compile(sampler=type(sampler).from_config(sampler.get_config()))
        outputs.append(task.generate(dict(prompt), stop_token_ids=(7,)))
    for name in ("token_ids", "padding_mask"):
        np.testing.assert_array_equal(outputs[0][name], outputs[1][name])


def test_cached_logits_are_those_of_the_full_forward_pass():
    model = RWRGPT2CausalLM(rwr_backbone(**STEPS["R5"], num_layers=1))
    tokens = make_tokens()
    expected = numpy(model({"token_ids": tokens, "padding_mask": np.ones_like(tokens)}))
    cache = model.empty_cache(BATCH, LENGTH)
    for start, stop in ((0, 6), (6, 8)):
        call = compiled(functools.partial(model.call_with_cache, cache_update_index=start))
        logits, hidden, cache = call(ops.convert_to_tensor(tokens[:, start:stop]), cache)
        assert_same(logits, expected[:, start:stop])
        assert tuple(hidden.shape) == (BATCH, stop - start, SIZES["hidden_dim"])


def test_generation_from_text():
    vocabulary = ["!", "a", "b", "Ġ", "Ġa", "Ġb", "ab", "Ġab", "<|endoftext|>"]
    tokenizer = keras_hub.models.GPT2Tokenizer(
        vocabulary={token: i for i, token in enumerate(vocabulary)},
        merges=["Ġ a", "Ġ b", "a b", "Ġa b"],
    )
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=12)
    model = RWRGPT2CausalLM(rwr_backbone(num_layers=1), preprocessor)
    model.compile(sampler="greedy")
    outputs = model.generate(["a b", " ab a b a"], max_length=9)
    assert outputs[0].startswith("a b")
    assert outputs[1].startswith(" ab a b a")


def test_bad_prompts():
    model = RWRGPT2CausalLM(rwr_backbone())
    model.compile(sampler="greedy")
    for row in ([0] * LENGTH, [0, 1] + [0] * (LENGTH - 2), [1, 0, 1] + [0] * (LENGTH - 3)):
        mask = np.array([[1, 1] + [0] * (LENGTH - 2), row])
        with pytest.raises(ValueError, match="`padding_mask` must be true at the tokens"):
            model.generate(
                {"token_ids": np.ones_like(mask), "padding_mask": mask}, stop_token_ids=None
            )


def test_caches_of_other_models_are_refused():
    model = RWRGPT2CausalLM(rwr_backbone())
    token = np.ones((1, 1), "int32")
    stock = np.zeros((1, 2, LENGTH, 2, 6), "float32")
    for cache in (stock[:, None], model.empty_cache(1, LENGTH)[:1]):
        with pytest.raises(ValueError, match=r"`cache` must be made by .* a tuple of 2 entries"):
            model.call_with_cache(token, cache, 3)
    with pytest.raises(ValueError, match=r"`cache\[0\]` must be a dict for a block of the class"):
        model.call_with_cache(token, (stock, stock), 3)
    fewer = RWRGPT2CausalLM(rwr_backbone(steps=1)).empty_cache(1, LENGTH)
    with pytest.raises(ValueError, match=r"`cache` must be made by .* with tensors of the shapes"):
        model.call_with_cache(token, fewer, 3)
    decoder = model.backbone.transformer_layers[0]
    x = np.zeros((1, 1, 12), "float32")
    with pytest.raises(TypeError, match="`cache` must be a WalkCache"):
        decoder(x, self_attention_cache=stock, self_attention_cache_update_index=3)
    with pytest.raises(ValueError, match="`decoder_attention_mask` must be `None`"):
        decoder(x, decoder_attention_mask=np.ones((1, 1, 1), bool))


def test_score_is_the_forward_pass():
    model = RWRGPT2CausalLM(rwr_backbone())
    batch = make_batch()
    assert_same(model.score(**batch), model(batch))


# --- saving and arguments ------------------------------------------------------------------------

OPTION_SETS = [
    {
        "alpha": 0.35,
        "steps": 3,
        "threshold": -0.1,
        "edge_weight": "exponential",
        "concentration": [2.0, 3.0],
        "reversible": True,
        "reciprocal_beta": 0.7,
        "lens_strength": [0.1, 0.2],
        "trainable_lens": True,
        "use_discoverability": True,
        "block_size": 8,
        "head_dim_pad": 16,
        "implementation": "portable",
        "dropout": 0.2,
    },
    {**STEPS["R5"], "rwr_layers": [1], "use_discoverability": True},
]


@pytest.mark.costly
@pytest.mark.parametrize("options", OPTION_SETS, ids=["many", "R5"])
def test_config_and_file_round_trip(tmp_path, options):
    backbone = rwr_backbone(**options)
    for name, value in {**SIZES, **SMALL, **options}.items():
        assert backbone.get_config()[name] == value
    again = RWRGPT2Backbone.from_config(backbone.get_config())
    assert again.get_config() == backbone.get_config()
    assert type(again.get_config()["rwr_layers"]) in (list, type(None))
    attention = again.transformer_layers[1]._self_attention_layer
    config = {
        **attention.options.to_config(),
        **attention.tuning.to_config(),
        "dropout": attention.dropout_layer_of_probabilities.rate,
        "rwr_layers": again.rwr_options["rwr_layers"],
    }
    for name, value in {**SMALL, **options}.items():
        assert config[name] == value

    expected = numpy(backbone(make_batch()))
    backbone.save(tmp_path / "backbone.keras")
    loaded = keras.models.load_model(tmp_path / "backbone.keras")
    assert type(loaded) is RWRGPT2Backbone
    assert_same(loaded(make_batch()), expected, atol=0)

    task = RWRGPT2CausalLM(backbone)
    task.save(tmp_path / "task.keras")
    # KerasHub's tasks do not save how they were compiled.
    loaded = keras.models.load_model(tmp_path / "task.keras", compile=False)
    assert type(loaded) is RWRGPT2CausalLM
    assert_same(loaded(make_batch()), task(make_batch()), atol=0)


def test_stock_presets_stay_stock(tmp_path):
    # Registering a subclass must not change which class KerasHub picks for a stock preset.
    keras_hub.models.GPT2CausalLM(stock_backbone()).save_to_preset(tmp_path / "stock")
    for base in (keras_hub.models.CausalLM, keras_hub.models.GPT2CausalLM):
        task = base.from_preset(str(tmp_path / "stock"), preprocessor=None)
        assert type(task) is keras_hub.models.GPT2CausalLM
        assert type(task.backbone) is keras_hub.models.GPT2Backbone


def test_layouts_of_the_weights_of_the_walk():
    mesh = keras.distribution.DeviceMesh((1, 1), ("batch", "model"), ["cpu:0"])
    layout_map = RWRGPT2Backbone.get_layout_map(mesh)
    options = {**STEPS["R5"], "use_discoverability": True}
    backbone = RWRGPT2Backbone(**ONE_LAYER, **options)
    layouts = {w.path: layout_map[w.path] for w in backbone.weights}
    lens = "transformer_layer_0/self_attention/walk/lens_strength"
    layouts[lens] = layout_map[lens]
    # What has an axis of heads is divided by heads, what has one of graphs is not.
    axes = {
        "discoverability": None,
        "graph_convolution": None,
        "graph_key": ("batch", None, None),
        "graph_query": ("batch", None, None),
        "hop_gate": ("batch", "model", None),
        "hop_weights": ("model", None),
        "lens_strength": ("model",),
        "log_concentration": None,
    }
    walk = {path.split("/")[-1]: x for path, x in layouts.items() if "/walk/" in path}
    assert {name: x and tuple(x.axes) for name, x in walk.items()} == axes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"neighbor_block": 8, "topk": 8}, ValueError, r"`neighbor_block` must be at most"),
        ({"alpha": 0.0}, ValueError, "Received: alpha=0.0"),
        ({"concentration": 0.5}, ValueError, "`concentration` must be in"),
        ({"lens_strength": [0.1]}, ValueError, "`lens_strength` must be .* one number a head, 2"),
        ({"implementation": "cuda"}, ValueError, "`implementation` must be"),
        ({"num_heads": 5}, ValueError, "`hidden_dim` must be a multiple of `num_heads`. Received"),
        ({"windows": 3}, TypeError, "`windows` is no argument here. Did you mean `window`.*=3"),
        ({"max_seq_length": 9}, TypeError, "Did you mean `max_sequence_length`"),
        ({"rwr_layers": 1}, TypeError, "`rwr_layers` must be `None` or a list of ints"),
        ({"rwr_layers": [0, -2]}, ValueError, "`rwr_layers` must be different layers of 2"),
        ({"rwr_layers": [2]}, ValueError, r"Received: rwr_layers=\[2\]"),
        ({"stopping": "gated", "alpha": 0.5}, ValueError, "`alpha` must be left at its default"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        RWRGPT2Backbone(**{**SIZES, **SMALL, **arguments})


def test_a_task_needs_its_backbone():
    with pytest.raises(TypeError, match="`backbone` must be a `RWRGPT2Backbone`"):
        RWRGPT2CausalLM(stock_backbone())
