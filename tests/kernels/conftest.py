"""The kernels of Triton and of Pallas, interpreted on the CPU.

Triton decides as it is imported whether it interprets, and importing Keras on torch imports it; the
Pallas backend decides as it is imported, too. So these tests are processes of their own:

    KERAS_BACKEND=torch TRITON_INTERPRET=1 python -m pytest tests/kernels
    KERAS_BACKEND=jax KERAS_RWR_INTERPRET=1 python -m pytest tests/kernels
"""

import functools
import os

import keras
import numpy as np
import pytest

# A backend's switch, and the tests of the other one's kernels alone.
SWITCHES = {"torch": "TRITON_INTERPRET", "jax": "KERAS_RWR_INTERPRET"}
TORCH_ONLY = ["test_layouts.py", "test_registration.py", "test_selection.py", "test_stages.py"]
JAX_ONLY = ["test_pallas_lowering.py", "test_pallas_selection.py", "test_pallas_transformations.py"]

if os.environ.get(SWITCHES.get(keras.backend.backend(), "")) != "1":
    raise pytest.UsageError(
        "tests/kernels needs KERAS_BACKEND=torch and TRITON_INTERPRET=1, "
        "or KERAS_BACKEND=jax and KERAS_RWR_INTERPRET=1"
    )

collect_ignore = JAX_ONLY
if keras.backend.backend() == "jax":
    collect_ignore = TORCH_ONLY


@pytest.fixture(autouse=True, scope="session")
def quick_calls():
    """Leaves out work of Triton's interpreter that does nothing."""
    if keras.backend.backend() != "torch":
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    numpy_pointer = np.dtype(np.uint64)
    numpy_scalar = functools.cache(interpreter._get_np_dtype)
    prepared = set()

    def call_without_patching(function, *arguments, **options):
        """What the interpreter does where one function of Triton calls another.

        It would prepare the language anew for each such call, a third of all its time. Once a
        module is enough: only what a launch prepares is undone at its end.
        """
        module = function.fn.__module__
        if module not in prepared:
            prepared.add(module)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*arguments, **options)

    def numpy_dtype(dtype):
        """`_get_np_dtype`, which makes a table in each of its calls: a tenth of all time."""
        scalar = dtype.scalar
        return numpy_pointer if isinstance(scalar, tl.pointer_type) else numpy_scalar(scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call_without_patching)
        patch.setattr(interpreter, "_get_np_dtype", numpy_dtype)
        yield


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nobody wrote holds NaN, or the largest integer; what varies is an error.

    Pallas's interpreter does that of itself.
    """
    if keras.backend.backend() != "torch":
        yield
        return
    import torch

    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
