"""Pallas kernels on several devices: each one attends with its own batch entries and heads."""

import pathlib

import numpy as np
from test_devices import run


def test_kernels_on_four_devices(tmp_path):
    script = pathlib.Path(__file__).with_name("run_pallas.py")
    run("jax", script, tmp_path / "results.npz", KERAS_RWR_INTERPRET="1")
    results = np.load(tmp_path / "results.npz")
    assert results["devices"] == 4
    for kind in ("data", "model"):
        np.testing.assert_allclose(results[f"{kind}/loss"], results["none/loss"], rtol=2e-6)
        error = np.abs(results[f"{kind}/gradients"] - results["none/gradients"]).max()
        assert error < 2e-5 * np.abs(results["none/gradients"]).max()
        assert results[f"{kind}/gathers"] == 0
