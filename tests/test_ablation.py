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
SMALL_R5 = {"window": 4, "topk": 4, "graph_dim": 5}
DEFAULTS = {"alpha": 0.2, "steps": 4, "topk": 32, "window": 128, "lens_strength": 0.3}


def test_steps_are_those_of_the_specification():
    assert list(STEPS) == ["R0", "R1", "R2", "R3", "R4", "R5"]
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
    assert STEPS["R5"].options == {
        "graph_heads": 1,
        "edge_weight": "exponential",
        "topk": 8,
        "neighbor_block": 1,
        "self_edges": False,
        "stopping": "gated",
        "steps": 4,
        "window": 128,
    }
    for name, step in STEPS.items():
        assert step.rwr_layers(6) == ([1, 3, 5] if name == "R5" else None)
    with pytest.raises(ValueError, match=r"at least 2 for R5, .* Received: num_layers=1"):
        build_backbone("R5", **SIZES)


def test_steps_cannot_be_changed():
    with pytest.raises(TypeError):
        STEPS["R6"] = STEPS["R1"]
    with pytest.raises(TypeError):
        STEPS["R1"].options["alpha"] = 0.5
    with pytest.raises(AttributeError):
        STEPS["R1"].name = "R6"


def test_overrides_replace_the_options_of_a_step():
    assert step_options("R2", {"window": 8})["window"] == 8
    assert step_options("R2", {"window": 8})["reversible"] is True
    assert step_options("R0") is None
    with pytest.raises(ValueError, match=r"must be empty for R0.*Received: overrides="):
        step_options("R0", {"window": 8})
    with pytest.raises(ValueError, match=r"one of 'R0', 'R1'.*Received: step='R9'"):
        step_options("R9")


def test_every_step_has_the_variables_of_stock_gpt2():
    sizes = {**SIZES, "num_layers": 2}
    stock = {weight.path: tuple(weight.shape) for weight in build_backbone("R0", **sizes).weights}
    extra = {
        "R3": {"discoverability": (2, 8)},
        "R4": {"log_concentration": (2,)},
        "R5": {
            "graph_query": (16, 1, 5),
            "graph_key": (16, 1, 5),
            "graph_convolution": (4, 1, 5),
            "log_concentration": (1,),
            "hop_weights": (2, 5),
            "hop_gate": (16, 2, 5),
        },
    }
    for step in ("R1", "R2", "R3", "R4", "R5"):
        backbone = build_backbone(step, SMALL_R5 if step == "R5" else SMALL_GRAPH, **sizes)
        shapes = {weight.path: tuple(weight.shape) for weight in backbone.weights}
        more = {
            f"transformer_layer_{layer}/self_attention/walk/{name}": shape
            for layer in ((1,) if step == "R5" else (0, 1))
            for name, shape in extra.get(step, {}).items()
        }
        assert shapes == {**stock, **more}, step
    backbone = build_backbone("R5", {**SMALL_R5, "rwr_layers": [0]}, **SIZES)
    assert backbone.rwr_options["rwr_layers"] == [0]


# Compiled steps take milliseconds; eager ones on torch would take four minutes.
TRAINING_STEPS = {"torch": 200}.get(keras.backend.backend(), 1000)


@pytest.mark.costly
@pytest.mark.parametrize("step", ["R3", "R5"])
def test_long_training_stays_finite(step):
    options = {**SMALL_R5, "rwr_layers": [0]} if step == "R5" else SMALL_GRAPH
    backbone = build_backbone(step, options, **SIZES)
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
