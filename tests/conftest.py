"""One process tests one backend: set `KERAS_BACKEND` before starting pytest."""

import os
import shutil
import zlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Test tensors are small: more threads only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Compiling small functions takes most of the tests' time on jax. This leaves out optimisations of
# the machine code, not those of the computation; tests/cross_backend/ compiles with all of them.
# On a GPU that setting gives wrong results, so it stays off where there is one.
if shutil.which("nvidia-smi") is None:
    flags = [
        "--xla_backend_optimization_level=0",
        # Small programs gain nothing from being compiled in several parts.
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
    if os.environ.get("KERAS_BACKEND") == "tensorflow":
        # A third of the time again; on jax `helpers.compiled` does so.
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ.setdefault("XLA_FLAGS", " ".join(flags))

import keras
import pytest

# Collected only where they are named: kernels/ is a process of its own, see its conftest.py.
collect_ignore = ["kernels"]
if keras.backend.backend() != "torch":
    collect_ignore += ["test_gpu_benchmark.py", "test_gpu_distributed.py", "test_gpu_kernels.py"]
    collect_ignore += ["test_machine_code.py"]
if keras.backend.backend() != "jax":
    collect_ignore += ["test_gpu_pallas.py"]


def pytest_addoption(parser):
    parser.addoption(
        "--share-costly",
        action="store_true",
        help="of tests marked as costly, jax and tensorflow run half each, torch all",
    )


def pytest_collection_modifyitems(config, items):
    backend = keras.backend.backend()
    if not config.getoption("--share-costly") or backend == "torch":
        return
    half = int(backend == "tensorflow")
    mine, others = [], []
    for item in items:
        # By name, so that a half has some of each parameter.
        is_mine = zlib.crc32(item.nodeid.encode()) % 2 == half
        (mine if is_mine or not item.get_closest_marker("costly") else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = mine


def pytest_report_header():
    return f"keras {keras.__version__} on {keras.backend.backend()}"


@pytest.fixture(autouse=True)
def fixed_seed():
    """Every test starts from the same random state, whatever ran before it."""
    keras.utils.set_random_seed(1729)
