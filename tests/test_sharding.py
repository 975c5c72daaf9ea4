"""Calls that are one piece of a larger one. tests/devices/ runs such pieces on several devices."""

import keras
import numpy as np
import pytest
from helpers import TOLERANCES, assert_close, compiled, numpy
from keras import ops

from keras_rwr import _sharding as sharding
from keras_rwr._dropout import keep_mask
from keras_rwr.models import RWRGPT2Backbone
from keras_rwr.ops import rwr_attention


def keep(seed, batch, heads):
    positions = ops.arange(11, dtype="int32")
    mask = keep_mask(seed, 0.4, batch, heads, positions[:, None], positions[None, :])
    return numpy(mask)


def test_pieces_drop_what_the_whole_drops():
    whole = keep(np.array([5, 7], "int32"), 6, 4)
    piece = keep(np.array([5, 7, 3, 2], "int32"), 2, 2)
    np.testing.assert_array_equal(piece, whole[3:5, 2:])
    assert not np.array_equal(piece, whole[:2, :2])
    np.testing.assert_array_equal(keep(np.array([5, 7, 0, 0], "int32"), 6, 4), whole)


def test_a_piece_of_attention_with_dropout():
    @compiled
    def attend(query, key, value, seed):
        return rwr_attention(query, key, value, seed=seed, dropout=0.4, topk=0, steps=1, window=2)

    tensors = np.random.default_rng(0).normal(size=(3, 2, 9, 2, 4)).astype("float32")
    whole = numpy(attend(*tensors, np.array([5, 7], "int32")))
    piece = numpy(attend(*tensors[:, 1:, :, 1:], np.array([5, 7, 1, 1], "int32")))
    assert_close(piece, whole[1:, :, 1:], TOLERANCES["output"])


def test_without_a_distribution_nothing_is_divided():
    run = sharding.over_devices(ops.add, ("b", "b"), "b")
    assert run.func is ops.add
    assert not sharding.is_active()


@pytest.fixture(scope="module")
def mesh():
    return keras.distribution.DeviceMesh((1, 1), ("batch", "model"), ["cpu:0"])


def test_layout_map_divides_heads_and_hidden_units(mesh):
    backbone = RWRGPT2Backbone(
        vocabulary_size=11,
        num_layers=1,
        num_heads=3,
        hidden_dim=15,
        intermediate_dim=7,
        edge_weight="exponential",
        trainable_lens=True,
        use_discoverability=True,
        neighbor_block=1,
        topk=2,
    )
    backbone.enable_lora(2)
    layout_map = RWRGPT2Backbone.get_layout_map(mesh)
    divided = {"batch": [], "model": []}
    for variable in backbone.weights:
        layout = layout_map[variable.path]
        if layout is not None:
            assert len(layout.axes) == len(variable.shape)
            for axis, size in zip(layout.axes, variable.shape, strict=True):
                if axis is not None:
                    divided[axis].append(size)
    assert set(divided["batch"]) == {15}
    # Three kernels with biases and two of LoRA's, the output's, and `lens_strength`; two kernels
    # and a bias.
    assert sorted(divided["model"]) == 10 * [3] + 3 * [7]
    assert len(divided["batch"]) == 2 + 6 + 2


def test_layout_map_needs_a_mesh_with_both_axes(mesh):
    with pytest.raises(ValueError, match="Received: device_mesh='mesh'"):
        RWRGPT2Backbone.get_layout_map("mesh")
    with pytest.raises(ValueError, match="Received: model_parallel_dim_name='heads'"):
        RWRGPT2Backbone.get_layout_map(mesh, model_parallel_dim_name="heads")
    with pytest.raises(ValueError, match="Received: data_parallel_dim_name='data'"):
        RWRGPT2Backbone.get_layout_map(mesh, data_parallel_dim_name="data")
