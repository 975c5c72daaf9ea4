"""RWR attention put into a stock GPT-2 in place."""

import keras
import keras_hub
import numpy as np
import pytest
from gpt2_models import (
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
    greedy,
    make_batch,
    make_tokens,
    numpy,
    randomize,
    walk_paths,
)

from keras_rwr.models import (
    RWRGPT2Backbone,
    RWRGPT2CausalLM,
    patch_gpt2_with_rwr,
    unpatch_gpt2,
)

EXTRAS = {"edge_weight": "exponential", "use_discoverability": True, "trainable_lens": True}
PROMPT_MASK = (np.arange(LENGTH) < np.array([[14], [16], [15]])).astype("int32")
PROMPT = {"token_ids": make_tokens() * PROMPT_MASK, "padding_mask": PROMPT_MASK}


def stock_task(sizes=ONE_LAYER):
    backbone = randomize(keras_hub.models.GPT2Backbone(**sizes, dropout=0.0))
    task = keras_hub.models.GPT2CausalLM(backbone)
    task.compile(keras.optimizers.Adam(1e-2), sampler="greedy", jit_compile=JIT_COMPILE)
    return task


def fit(task, **arguments):
    history = task.fit(
        make_batch(), make_tokens(3), sample_weight=MASK, shuffle=False, verbose=0, **arguments
    )
    return history.history["loss"]


def predict(task, batch=None):
    return task.predict(make_batch() if batch is None else batch, verbose=0)


@pytest.mark.costly
def test_a_trained_task_patched_trained_on_and_undone():
    task = stock_task(SIZES)
    fit(task)
    stock_logits = predict(task)
    task.generate(dict(PROMPT), stop_token_ids=None)
    weights, optimizer = task.weights, task.optimizer
    state = {variable.path: numpy(variable) for variable in optimizer.variables}

    assert patch_gpt2_with_rwr(task, layers=[-1], **STEPS["R5"]) is task
    paths = {weight.path for weight in task.weights} - {weight.path for weight in weights}
    assert paths == walk_paths(R5_WEIGHTS, (1,))
    kept = {id(weight) for weight in task.trainable_weights}
    assert {id(weight) for weight in weights} < kept
    assert task.optimizer is optimizer
    now = {variable.path: numpy(variable) for variable in optimizer.variables}
    assert len(now) == len(state) + 2 * len(paths)
    for path, value in state.items():
        np.testing.assert_array_equal(now[path], value)
    # Every way to run the model has the new attention in it.
    logits = predict(task)
    assert np.abs(logits - stock_logits)[MASK > 0].max() > 1e-3
    np.testing.assert_allclose(numpy(task(make_batch())), logits, rtol=0, atol=1e-5)
    output = task.generate(dict(PROMPT), stop_token_ids=None)["token_ids"]
    np.testing.assert_array_equal(output, greedy(lambda batch: predict(task, batch), **PROMPT))
    before = {weight.path: numpy(weight) for weight in task.weights}
    losses = fit(task, epochs=2)
    assert losses[1] < losses[0]
    for weight in task.weights:
        assert (numpy(weight) != before[weight.path]).any(), weight.path

    assert unpatch_gpt2(task) is task
    assert [id(weight) for weight in task.weights] == [id(weight) for weight in weights]
    fresh = stock_task(SIZES)
    fresh.set_weights(task.get_weights())
    np.testing.assert_allclose(predict(task), numpy(fresh(make_batch())), rtol=0, atol=1e-5)
    assert task.generate.__func__ is type(task).generate
    assert not {"generate_step", "call_with_cache", "_build_cache"} & vars(task).keys()
    assert len(optimizer.variables) == len(state)


def test_a_patched_backbone_is_the_converted_one():
    task = stock_task(SIZES)
    converted = RWRGPT2CausalLM(RWRGPT2Backbone.from_backbone(task.backbone, **SMALL, **EXTRAS))
    # The task around the backbone generates with the walk cache too.
    patch_gpt2_with_rwr(task.backbone, **SMALL, **EXTRAS)
    np.testing.assert_array_equal(numpy(task(make_batch())), numpy(converted(make_batch())))
    assert [weight.path for weight in task.weights] == [w.path for w in converted.weights]
    assert isinstance(task.call_with_cache.__self__, type(task))
    assert task._build_cache(make_tokens())[1][0].keys() == {"key", "walks", "means"}
    # Its options come along, and weights files go both ways.
    randomize(task.backbone, seed=5)
    again = RWRGPT2Backbone.from_backbone(task.backbone)
    assert again.rwr_options == converted.backbone.rwr_options
    np.testing.assert_array_equal(numpy(again(make_batch())), numpy(task.backbone(make_batch())))
    assert {type(x).__module__ for x in stock_task().backbone.transformer_layers} == {
        "keras_hub.src.layers.modeling.transformer_decoder"
    }


def test_patched_layers_that_do_not_walk_are_converted():
    backbone = keras_hub.models.GPT2Backbone(**SIZES)
    patch_gpt2_with_rwr(backbone, layers=[1], **STEPS["R5"])
    # Layers that are not patched stay what they are.
    mixed = RWRGPT2Backbone.from_backbone(randomize(backbone))
    assert (mixed.rwr_options["rwr_layers"], mixed.rwr_options["rwr_others"]) == ([1], "stock")
    np.testing.assert_array_equal(numpy(mixed(make_batch())), numpy(backbone(make_batch())))
    patch_gpt2_with_rwr(backbone, layers=[0], window=3, topk=0, steps=0, lens_strength=0.0)
    converted = RWRGPT2Backbone.from_backbone(randomize(backbone))
    assert converted.rwr_options["rwr_layers"] == [1]
    np.testing.assert_array_equal(numpy(converted(make_batch())), numpy(backbone(make_batch())))
    patch_gpt2_with_rwr(unpatch_gpt2(backbone), layers=[0], **STEPS["R5"])
    patch_gpt2_with_rwr(backbone, layers=[1], **STEPS["R4"])
    with pytest.raises(ValueError, match=r"the same options in all layers that walk"):
        RWRGPT2Backbone.from_backbone(backbone)


def test_what_survives_saving(tmp_path):
    task = patch_gpt2_with_rwr(stock_task(), **SMALL)
    task.backbone.save_weights(tmp_path / "a.weights.h5")
    again = patch_gpt2_with_rwr(stock_task(), **SMALL)
    randomize(again, seed=4).backbone.load_weights(tmp_path / "a.weights.h5")
    np.testing.assert_array_equal(numpy(again(make_batch())), numpy(task(make_batch())))
    task.save_to_preset(tmp_path / "preset")
    loaded = keras_hub.models.CausalLM.from_preset(str(tmp_path / "preset"), preprocessor=None)
    unpatch_gpt2(task)
    np.testing.assert_array_equal(numpy(loaded(make_batch())), numpy(task(make_batch())))


def test_lora_goes_on():
    task = stock_task()
    task.backbone.enable_lora(2)
    randomize(task)
    task.compile(keras.optimizers.Adam(1e-2), jit_compile=JIT_COMPILE)
    expected = numpy(task(make_batch()))[MASK > 0]
    names = [weight.path for weight in task.trainable_weights]
    patch_gpt2_with_rwr(task, **PLAIN, trainable_lens=True)
    output = numpy(task(make_batch()))[MASK > 0]
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5)
    # Frozen like the rest of the attention.
    assert [weight.path for weight in task.trainable_weights] == names
    assert sum("lora_kernel" in name for name in names) == 4
    losses = fit(task, epochs=2)
    assert losses[1] < losses[0]


@pytest.mark.costly
@QUANTIZE
def test_quantized_models():
    task = stock_task()
    task.quantize("int8")
    expected = numpy(task(make_batch()))
    patch_gpt2_with_rwr(task, **PLAIN)
    output = numpy(task(make_batch()))[MASK > 0]
    np.testing.assert_allclose(output, expected[MASK > 0], rtol=0, atol=1e-5)
    unpatch_gpt2(patch_gpt2_with_rwr(unpatch_gpt2(task), layers=(0,), **SMALL))
    np.testing.assert_array_equal(numpy(task(make_batch())), expected)


# --- bad input -----------------------------------------------------------------------------------


class Caller(keras.callbacks.Callback):
    """Calls a function in each loop, which must raise."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.messages = []

    def on_train_batch_end(self, batch, logs=None):
        with pytest.raises(ValueError, match="must not be running") as caught:
            self.function()
        self.messages.append(str(caught.value))

    on_test_batch_end = on_predict_batch_end = on_train_batch_end


@pytest.mark.costly
def test_patching_a_running_model():
    task = stock_task()
    patch = Caller(lambda: patch_gpt2_with_rwr(task.backbone, **SMALL))
    fit(task, callbacks=[patch])
    task.predict(make_batch(), verbose=0, callbacks=[patch])
    task.evaluate(make_batch(), make_tokens(), verbose=0, callbacks=[patch])
    for loop, message in zip(("fit", "predict", "evaluate"), patch.messages, strict=True):
        assert f"patch or unpatch before `{loop}`" in message
        assert message.endswith(f"Received: model in GPT2CausalLM.{loop}()")
    patch_gpt2_with_rwr(task, **SMALL)
    undo = Caller(lambda: unpatch_gpt2(task))
    task.predict(make_batch(), verbose=0, callbacks=[undo])
    assert len(undo.messages) == 1
    unpatch_gpt2(task)


@pytest.fixture(scope="module")
def half_patched():
    backbone = keras_hub.models.GPT2Backbone(**SIZES)
    return patch_gpt2_with_rwr(backbone, layers=[1], **SMALL)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, r"call `unpatch_gpt2` first .*: layers=None, patched already: \[1\]"),
        ({"layers": [-1]}, ValueError, r"layers=\[-1\], patched already: \[1\]"),
        ({"layers": [2]}, ValueError, r"different layers of 2, numbered .* layers=\[2\]"),
        ({"layers": []}, ValueError, r"`layers` must be one or more .* layers=\[\]"),
        ({"layers": [0, -2]}, ValueError, r"`layers` must be different layers of 2"),
        ({"layers": 0}, TypeError, "`layers` must be `None` or a list of ints. Received: layers=0"),
        ({"layers": [True]}, TypeError, "`layers` must be `None` or a list of ints"),
        ({"layers": [0], "windows": 3}, TypeError, "Did you mean `window`.* Received: windows=3"),
        ({"layers": [0], "num_heads": 3}, TypeError, "`num_heads` is no argument here"),
        ({"rwr_layers": [0]}, TypeError, "Did you mean `layers`"),
        ({"layers": [0], "alpha": 0.0}, ValueError, "Received: alpha=0.0"),
        ({"layers": [0], "topk": 20, "neighbor_block": 1, "window": 3}, ValueError, "topk=20"),
        ({"layers": [0], "lens_strength": [1.0]}, ValueError, "one number a head, 2 of"),
    ],
)
def test_bad_arguments(half_patched, arguments, error, message):
    first, second = half_patched.transformer_layers
    attentions = first._self_attention_layer, second._self_attention_layer
    with pytest.raises(error, match=message):
        patch_gpt2_with_rwr(half_patched, **arguments)
    assert (first._self_attention_layer, second._self_attention_layer) == attentions


def test_bad_models(half_patched):
    with pytest.raises(TypeError, match=r"`model` must be a `keras_hub.models.GPT2Backbone` or"):
        patch_gpt2_with_rwr(keras.Sequential())
    backbone = RWRGPT2Backbone(**ONE_LAYER)
    for model in (backbone, RWRGPT2CausalLM(backbone)):
        with pytest.raises(TypeError, match=r"change its options with `RWRGPT2Backbone.from_back"):
            patch_gpt2_with_rwr(model)
    with pytest.raises(ValueError, match=r"must have layers patched by .* with none"):
        unpatch_gpt2(keras_hub.models.GPT2Backbone(**ONE_LAYER))
