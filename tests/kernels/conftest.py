"""The Triton kernels, interpreted on the CPU.

Triton decides as it is imported whether it interprets, and importing Keras on torch imports it. So
these tests are a process of their own:

    KERAS_BACKEND=torch TRITON_INTERPRET=1 python -m pytest tests/kernels
"""

import functools
import os

import keras
import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

if keras.backend.backend() != "torch" or os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/kernels needs KERAS_BACKEND=torch and TRITON_INTERPRET=1")


def call_without_patching(function, *arguments, **options):
    """What the interpreter does where one function of Triton calls another.

    It would prepare the language anew for each such call, a third of all its time. Once a module
    is enough: only what a launch prepares is undone at its end.
    """
    module = function.fn.__module__
    if module not in prepared:
        prepared.add(module)
        interpreter._patch_lang(function.fn)
    return function.rewrite()(*arguments, **options)


prepared = set()


def numpy_dtype(dtype):
    """`_get_np_dtype`, which makes a table in each of its calls: a tenth of all time."""
    scalar = dtype.scalar
    return numpy_pointer if isinstance(scalar, tl.pointer_type) else numpy_scalar(scalar)


numpy_pointer = np.dtype(np.uint64)
numpy_scalar = functools.cache(interpreter._get_np_dtype)


@pytest.fixture(autouse=True, scope="session")
def quick_calls():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call_without_patching)
        patch.setattr(interpreter, "_get_np_dtype", numpy_dtype)
        yield


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nobody wrote holds NaN, or the largest integer; what varies is an error."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
