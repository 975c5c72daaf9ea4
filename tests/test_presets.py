"""Presets of GPT-2: stock ones converted, ours, and what does not fit."""

import gc
import weakref

import keras
import keras_hub
import numpy as np
import pytest
from gpt2_models import (
    LENGTH,
    ONE_LAYER,
    PLAIN,
    QUANTIZE,
    SIZES,
    SMALL,
    STEPS,
    make_batch,
    numpy,
    randomize,
)

from keras_rwr.models import (
    RWRGPT2Backbone,
    RWRGPT2CausalLM,
    RWRGPT2CausalLMPreprocessor,
    RWRGPT2Preprocessor,
    RWRGPT2Tokenizer,
    conversion,
)

OPTIONS = {**STEPS["R5"], "use_discoverability": True}
OURS = {
    keras_hub.models.Backbone: RWRGPT2Backbone,
    keras_hub.models.GPT2Backbone: RWRGPT2Backbone,
    keras_hub.models.CausalLM: RWRGPT2CausalLM,
    keras_hub.models.GPT2CausalLM: RWRGPT2CausalLM,
    keras_hub.models.CausalLMPreprocessor: RWRGPT2CausalLMPreprocessor,
    keras_hub.models.GPT2CausalLMPreprocessor: RWRGPT2CausalLMPreprocessor,
    keras_hub.models.GPT2Preprocessor: RWRGPT2Preprocessor,
    keras_hub.tokenizers.Tokenizer: RWRGPT2Tokenizer,
    keras_hub.tokenizers.GPT2Tokenizer: RWRGPT2Tokenizer,
}
TEXT = "a b ab"


@pytest.fixture(scope="module")
def stock():
    vocabulary = ["!", "a", "b", "Ġ", "Ġa", "Ġb", "ab", "Ġab", "<|endoftext|>"]
    tokenizer = keras_hub.models.GPT2Tokenizer(
        vocabulary={token: i for i, token in enumerate(vocabulary)},
        merges=["Ġ a", "Ġ b", "a b", "Ġa b"],
    )
    return keras_hub.models.GPT2CausalLM(
        randomize(keras_hub.models.GPT2Backbone(**ONE_LAYER)),
        keras_hub.models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=7),
    )


@pytest.fixture(scope="module")
def stock_preset(stock, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    stock.save_to_preset(folder)
    return str(folder)


@pytest.fixture(scope="module")
def own(stock_preset):
    task = RWRGPT2CausalLM.from_preset(stock_preset, **OPTIONS)
    for weight in conversion.walk_weights(task.backbone):
        weight.assign(weight + 0.125)
    return task


@pytest.fixture(scope="module")
def own_preset(own, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    own.save_to_preset(folder)
    return str(folder)


def assert_same_weights(model, expected):
    assert [weight.path for weight in model.weights] == [w.path for w in expected.weights]
    for weight, other in zip(model.weights, expected.weights, strict=True):
        np.testing.assert_array_equal(numpy(weight), numpy(other))


def test_a_stock_preset_is_converted(stock, stock_preset):
    task = RWRGPT2CausalLM.from_preset(stock_preset, **PLAIN)
    assert type(task) is RWRGPT2CausalLM
    assert type(task.preprocessor) is RWRGPT2CausalLMPreprocessor
    assert type(task.preprocessor.tokenizer) is RWRGPT2Tokenizer
    assert_same_weights(task, stock)
    expected = stock.preprocessor(TEXT)[0]["token_ids"]
    np.testing.assert_array_equal(task.preprocessor(TEXT)[0]["token_ids"], expected)
    assert task.preprocessor.sequence_length == 7
    real = make_batch()["padding_mask"] > 0
    logits, expected = numpy(task(make_batch())), numpy(stock(make_batch()))
    np.testing.assert_allclose(logits[real], expected[real], rtol=0, atol=1e-5)

    backbone = RWRGPT2Backbone.from_preset(stock_preset, dtype="mixed_bfloat16", **OPTIONS)
    assert backbone.dtype_policy.name == "mixed_bfloat16"
    assert backbone.rwr_options["stopping"] == "gated"
    weights = {weight.path: weight for weight in backbone.weights}
    for weight in stock.backbone.weights:
        np.testing.assert_array_equal(numpy(weights[weight.path]), numpy(weight))

    for cls in (RWRGPT2Tokenizer, RWRGPT2Preprocessor, RWRGPT2CausalLMPreprocessor):
        assert type(cls.from_preset(stock_preset)) is cls


def test_conversion_leaves_one_copy(stock_preset, monkeypatch):
    stock = []
    convert = RWRGPT2Backbone.from_backbone.__func__

    def watched(cls, backbone, **options):
        stock.append(weakref.ref(backbone.weights[0]))
        return convert(cls, backbone, **options)

    monkeypatch.setattr(RWRGPT2Backbone, "from_backbone", classmethod(watched))
    gc.disable()
    try:
        RWRGPT2Backbone.from_preset(stock_preset)
        RWRGPT2CausalLM.from_preset(stock_preset, preprocessor=None)
    finally:
        gc.enable()
    assert [reference() for reference in stock] == [None, None]


def test_layers_that_walk(tmp_path):
    stock = keras_hub.models.GPT2Backbone(**SIZES)
    stock.save_to_preset(tmp_path / "stock")
    backbone = RWRGPT2Backbone.from_preset(str(tmp_path / "stock"), rwr_layers=[-1], **OPTIONS)
    assert backbone.rwr_options["rwr_layers"] == [1]
    randomize(backbone).save_to_preset(tmp_path / "own")
    loaded = RWRGPT2Backbone.from_preset(str(tmp_path / "own"), rwr_layers=(1,))
    assert loaded.rwr_options == backbone.rwr_options
    assert_same_weights(loaded, backbone)
    np.testing.assert_array_equal(numpy(loaded(make_batch())), numpy(backbone(make_batch())))
    with pytest.raises(ValueError, match=r"saved with, rwr_layers=\[1\]. To .*rwr_layers=\[0\]"):
        RWRGPT2Backbone.from_preset(str(tmp_path / "own"), rwr_layers=[0])


def test_without_weights(stock, stock_preset):
    for cls in (RWRGPT2Backbone, RWRGPT2CausalLM):
        model = cls.from_preset(stock_preset, load_weights=False)
        embeddings = numpy(model.weights[0])
        assert embeddings.shape == numpy(stock.weights[0]).shape
        assert (embeddings != numpy(stock.weights[0])).any()


def test_an_own_preset_loads_as_saved(own, own_preset):
    for cls in (keras_hub.models.CausalLM, keras_hub.models.GPT2CausalLM, RWRGPT2CausalLM):
        task = cls.from_preset(own_preset)
        assert type(task) is RWRGPT2CausalLM
        assert task.backbone.rwr_options == own.backbone.rwr_options
        assert_same_weights(task, own)
        assert task.preprocessor.tokenizer.detokenize(task.preprocessor.tokenizer(TEXT)) == TEXT
    backbone = RWRGPT2Backbone.from_preset(own_preset, window=3, dtype="bfloat16", trainable=False)
    assert not backbone.trainable_weights
    assert backbone.dtype_policy.name == "bfloat16"
    task = RWRGPT2CausalLM.from_preset(own_preset, preprocessor=None, dtype="mixed_bfloat16")
    assert task.preprocessor is None
    assert task.backbone.dtype_policy.name == "mixed_bfloat16"


@pytest.mark.parametrize("base", OURS, ids=lambda cls: cls.__name__)
def test_base_classes_find_ours_and_only_for_ours(base, own_preset, stock_preset):
    assert type(base.from_preset(own_preset)) is OURS[base]
    assert type(base.from_preset(stock_preset)) in OURS[base].__mro__[1:]


@pytest.mark.costly
@QUANTIZE
def test_quantized_presets(own, tmp_path):
    task = RWRGPT2CausalLM(RWRGPT2Backbone.from_backbone(own.backbone))
    task.backbone.quantize("int8")
    expected = numpy(task(make_batch()))
    task.save_to_preset(tmp_path)
    loaded = RWRGPT2CausalLM.from_preset(str(tmp_path))
    np.testing.assert_array_equal(numpy(loaded(make_batch())), expected)
    backbone = RWRGPT2Backbone.from_preset(str(tmp_path))
    assert_same_weights(backbone, task.backbone)
    assert any("int8" in weight.dtype for weight in backbone.weights)
    # The other way, and to other options.
    for model in (task.to_stock(drop_rwr_weights=True).backbone, task.backbone):
        again = RWRGPT2Backbone.from_backbone(model, **OPTIONS)
        assert_same_weights(again.to_stock(True), task.backbone.to_stock(True))


def test_presets_after_lora(own, tmp_path):
    backbone = RWRGPT2Backbone.from_backbone(own.backbone)
    backbone.enable_lora(2)
    for weight in backbone.trainable_weights:
        weight.assign(weight + 0.25)
    backbone.save_to_preset(tmp_path)
    loaded = RWRGPT2Backbone.from_preset(str(tmp_path))
    assert [weight.path for weight in loaded.weights] == [w.path for w in own.backbone.weights]
    np.testing.assert_allclose(
        numpy(loaded(make_batch())), numpy(backbone(make_batch())), rtol=0, atol=1e-5
    )
    for convert in (backbone.to_stock, lambda _: RWRGPT2Backbone.from_backbone(backbone)):
        with pytest.raises(ValueError, match=r"must be without LoRA. Save .* Received: backbone="):
            convert(True)


def test_to_stock(stock, own, own_preset):
    with pytest.raises(ValueError, match=r"pass `drop_rwr_weights=True`.* Received: weights \["):
        own.to_stock()
    task = own.to_stock(drop_rwr_weights=True)
    assert type(task) is keras_hub.models.GPT2CausalLM
    assert type(task.backbone) is keras_hub.models.GPT2Backbone
    assert type(task.preprocessor) is keras_hub.models.GPT2CausalLMPreprocessor
    assert type(task.preprocessor.tokenizer) is keras_hub.models.GPT2Tokenizer
    assert_same_weights(task, stock)
    np.testing.assert_array_equal(numpy(task(make_batch())), numpy(stock(make_batch())))
    np.testing.assert_array_equal(
        task.preprocessor(TEXT)[0]["token_ids"], stock.preprocessor(TEXT)[0]["token_ids"]
    )


def test_copies_do_not_share_memory(stock):
    # A training step deletes the buffers of the weights that it updates, on jax.
    task = RWRGPT2CausalLM(RWRGPT2Backbone.from_backbone(stock.backbone, **SMALL))
    before = numpy(stock(make_batch()))
    task.compile(keras.optimizers.SGD(0.1))
    task.train_on_batch(make_batch(), make_batch()["token_ids"])
    np.testing.assert_array_equal(numpy(stock(make_batch())), before)


def test_the_older_name(stock):
    import keras_nlp

    assert keras_nlp.models.GPT2Backbone is keras_hub.models.GPT2Backbone
    backbone = randomize(keras_nlp.models.GPT2Backbone(**ONE_LAYER))
    assert_same_weights(RWRGPT2Backbone.from_backbone(backbone), backbone)


def test_presets_by_name():
    names = keras_hub.models.GPT2Backbone.presets.keys()
    assert "gpt2_base_en" in names
    for cls in {*OURS.values()}:
        assert cls.presets.keys() == names


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [RWRGPT2Backbone, RWRGPT2CausalLM])
def test_bad_presets(cls, own_preset, tmp_path):
    keras_hub.models.BertBackbone(
        vocabulary_size=11, num_layers=1, num_heads=1, hidden_dim=4, intermediate_dim=4
    ).save_to_preset(tmp_path)
    for preset in (str(tmp_path), str(tmp_path / "none"), "gpt2_base"):
        with pytest.raises(ValueError, match=r"`preset` must be a GPT2.*(?s:.)*Received: preset='"):
            cls.from_preset(preset)
    with pytest.raises(ValueError, match=r"must be those that the preset was saved with, window=3"):
        cls.from_preset(own_preset, window=5, topk=4)
    with pytest.raises(ValueError, match=r"from_backbone.backbone, window=5.`. Received: window=5"):
        cls.from_preset(own_preset, window=5, topk=4)


@pytest.mark.parametrize(
    ("cls", "name", "meant"),
    [
        (RWRGPT2Backbone, "windows", "window"),
        (RWRGPT2Backbone, "max_length", "max_sequence_length"),
        (RWRGPT2CausalLM, "rwr_layer", "rwr_layers"),
        (RWRGPT2CausalLM, "preprocesor", "preprocessor"),
    ],
)
def test_misspelt_arguments(cls, name, meant, own_preset, stock_preset):
    for preset in (own_preset, stock_preset):
        with pytest.raises(TypeError, match=f"`{name}` is no argument .*`{meant}`.* Rec.*{name}=3"):
            cls.from_preset(preset, **{name: 3})


def test_options_that_do_not_fit_the_context(stock_preset):
    with pytest.raises(ValueError, match=r"`topk` must be at most .* max_sequence_length=19"):
        RWRGPT2Backbone.from_preset(stock_preset, window=3, topk=20, neighbor_block=4)
    assert RWRGPT2Backbone.from_preset(stock_preset, window=LENGTH - 1, topk=64)
    with pytest.raises(ValueError, match="`lens_strength` must be a number or one number a head"):
        RWRGPT2Backbone.from_preset(stock_preset, lens_strength=[0.1])


def test_weights_with_other_options_are_refused(stock, own, tmp_path):
    own.backbone.save_weights(tmp_path / "own.weights.h5")
    same = RWRGPT2Backbone.from_config(own.backbone.get_config())
    same.load_weights(tmp_path / "own.weights.h5")
    assert_same_weights(same, own.backbone)
    other = RWRGPT2Backbone(**ONE_LAYER, **STEPS["R5"])
    with pytest.raises(ValueError, match=r"options must be those of the saved layer. Received: ."):
        other.load_weights(tmp_path / "own.weights.h5")
    fewer = RWRGPT2Backbone(**ONE_LAYER, **SMALL)
    with pytest.raises(ValueError, match=r"options must be those of the saved layer. Received: ."):
        fewer.load_weights(tmp_path / "own.weights.h5")
