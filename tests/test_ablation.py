"""The ablation steps, and that the riskier ones train without blowing up."""

import keras
import numpy as np
import pytest

from keras_rwr.ablation import STEPS, build_backbone, step_options

SIZES = {
    "vocabulary_size": 31,
    "num_layers": 1,
    "num_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 32,
    "dropout": 0.0,
    "max_sequence_length": 32,
}
SMALL_GRAPH = {"window": 4, "topk": 8, "neighbor_block": 4}
DEFAULTS = {"alpha": 0.2, "steps": 4, "topk": 32, "window": 128, "lens_strength": 0.3}


def test_steps_are_those_of_the_specification():
    assert list(STEPS) == ["R0", "R1", "R2", "R3", "R4"]
    assert all(name == step.name for name, step in STEPS.items())
    assert STEPS["R0"].options is None
    assert STEPS["R1"].options == DEFAULTS
    assert STEPS["R2"].options == {**DEFAULTS, "reversible": True, "reciprocal_beta": 0.5}
    assert STEPS["R3"].options == {
        **DEFAULTS,
        "reversible": True,
        "reciprocal_beta": 0.7,
        "use_discoverability": True,
    }
    assert STEPS["R4"].options == {**DEFAULTS, "edge_weight": "exponential"}


def test_steps_cannot_be_changed():
    with pytest.raises(TypeError):
        STEPS["R5"] = STEPS["R1"]
    with pytest.raises(TypeError):
        STEPS["R1"].options["alpha"] = 0.5
    with pytest.raises(AttributeError):
        STEPS["R1"].name = "R5"


def test_overrides_replace_the_options_of_a_step():
    assert step_options("R2", {"window": 8})["window"] == 8
    assert step_options("R2", {"window": 8})["reversible"] is True
    assert step_options("R0") is None
    with pytest.raises(ValueError, match=r"must be empty for R0.*Received: overrides="):
        step_options("R0", {"window": 8})
    with pytest.raises(ValueError, match=r"one of R0, R1.*Received: step='R9'"):
        step_options("R9")


def test_every_step_has_the_variables_of_stock_gpt2():
    stock = {weight.path: tuple(weight.shape) for weight in build_backbone("R0", **SIZES).weights}
    attention = "transformer_layer_0/self_attention/"
    extra = {
        "R3": {attention + "discoverability": (2, 8)},
        "R4": {attention + "concentration": (2,)},
    }
    for step in ("R1", "R2", "R3", "R4"):
        backbone = build_backbone(step, SMALL_GRAPH, **SIZES)
        shapes = {weight.path: tuple(weight.shape) for weight in backbone.weights}
        assert shapes == {**stock, **extra.get(step, {})}, step


# Compiled steps take milliseconds; eager ones on torch would take four minutes.
TRAINING_STEPS = {"torch": 200}.get(keras.backend.backend(), 1000)


@pytest.mark.parametrize("step", ["R2", "R3"])
def test_long_training_stays_finite(step):
    backbone = build_backbone(step, SMALL_GRAPH, **SIZES)
    logits = backbone.token_embedding(backbone.output, reverse=True)
    model = keras.Model(backbone.input, logits)
    model.compile(
        optimizer=keras.optimizers.Adam(3e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    # a sequence repeats after half its length, so that the far edges are worth learning
    half = np.random.default_rng(0).integers(0, 31, (2 * TRAINING_STEPS, 16)).astype("int32")
    token_ids = np.concatenate([half, half], axis=1)
    inputs = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    history = model.fit(
        inputs,
        np.roll(token_ids, -1, axis=1),
        batch_size=2,
        epochs=1,
        shuffle=False,
        verbose=0,
        callbacks=[keras.callbacks.TerminateOnNaN(raise_error=True)],
    )
    assert int(model.optimizer.iterations) == TRAINING_STEPS
    assert np.isfinite(history.history["loss"]).all()
    for weight in model.weights:
        assert np.isfinite(weight.numpy()).all(), weight.path
    assert np.isfinite(model.predict_on_batch({k: v[:2] for k, v in inputs.items()})).all()
