"""The sdist and the wheel: what they hold, and that the wheel works without the source tree."""

import email
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest
from isolation import BACKENDS, others, run_python
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import keras_rwr

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Packages of the wheel, and the folders that they come from.
SOURCES = {"keras_rwr": "keras_rwr", "keras_rwr/backends": "backends"}

FORWARD = """
import keras
import numpy as np
import keras_rwr
import keras_rwr.backends

for module in (keras_rwr, keras_rwr.backends):
    assert module.__file__.startswith({target!r}), module.__file__
layers = [
    keras.layers.MultiHeadAttention(num_heads=2, key_dim=12),
    keras_rwr.RWRAttention(num_heads=2, key_dim=12, window=211, lens_strength=0.0),
    keras_rwr.RWRAttention(num_heads=2, key_dim=12, window=32),
]
inputs = keras.Input((211, 24))
model = keras.Model(inputs, [layer(inputs, inputs, use_causal_mask=True) for layer in layers])
for layer in layers[1:]:
    layer.set_weights(layers[0].get_weights())
x = np.random.default_rng(0).normal(size=(1, 211, 24))
full, local, walk = model.predict(x, verbose=0)
np.testing.assert_allclose(local, full, atol=1e-5)
assert np.isfinite(walk).all() and np.abs(walk - full).max() > 1e-3
print(keras_rwr.explain((1, 211, 2, 12), is_causal=True, window=32).implementation)
"""


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Paths of the sdist, and of the wheel that was built from it."""
    source = tmp_path_factory.mktemp("source") / "keras-rwr"
    output = tmp_path_factory.mktemp("distributions")
    shutil.copytree(ROOT, source, ignore=not_sources)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", output, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = output.glob("*.tar.gz"), output.glob("*.whl")
    return sdist, wheel


def not_sources(folder, names):
    """Names in a folder that are no part of the source: results, caches, environments."""
    folder = pathlib.Path(folder)
    return {
        name
        for name in names
        if name in {".git", "runs", "build", "dist", "__pycache__"}
        or name.endswith(("_cache", ".egg-info"))
        or (folder / name / "pyvenv.cfg").is_file()
    }


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory):
    """A folder with the wheel, and nothing else, installed."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", target, distributions[1]], check=True)
    return target


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (x for x in archive.namelist() if x.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_wheel_holds_the_packages_and_nothing_else(distributions):
    with zipfile.ZipFile(distributions[1]) as archive:
        names = archive.namelist()
    held = {name for name in names if ".dist-info/" not in name}
    expected = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for package, folder in SOURCES.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert held == expected | {"keras_rwr/py.typed"}
    assert "keras_rwr/backends/__init__.py" in held
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_sdist_holds_what_a_checkout_has(distributions):
    with tarfile.open(distributions[0]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    expected = {"LICENSE", "README.md", "CHANGELOG.md", "constraints.txt", "run.py"}
    for folder in ("keras_rwr", "backends", "benchmarks", "examples", "studies", "tests"):
        expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")}
    expected |= {f"examples/data/{path.name}" for path in (ROOT / "examples/data").iterdir()}
    assert expected <= held


def test_metadata(distributions):
    fields = metadata(distributions[1])
    assert fields["Version"] == keras_rwr.__version__
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Requires-Python"] == ">=3.11"
    extras = {"torch", "jax", "tensorflow", "hub", "examples", "test", "dev"}
    assert set(fields.get_all("Provides-Extra")) == extras
    required = [Requirement(x) for x in fields.get_all("Requires-Dist")]
    assert {x.name for x in required if x.marker is None} == {"keras", "numpy"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_wheel_runs_with_one_framework(backend, installed, tmp_path):
    done = run_python(
        FORWARD.format(target=str(installed)),
        backend=backend,
        hidden=(*others(backend), "keras_hub"),
        path=[installed],
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "portable"


def test_constraints_pin_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [project["dependencies"], *project["optional-dependencies"].values()]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    pinned = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    for requirement in map(Requirement, (x for group in asked for x in group)):
        if requirement.name != project["name"]:
            assert requirement.specifier.contains(pinned[requirement.name]), requirement
