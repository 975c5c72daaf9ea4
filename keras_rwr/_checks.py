"""Checks of arguments. Each error names the argument, the rule and what was received."""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.src.backend.common.symbolic_scope import in_symbolic_scope


def check_int(name: str, value: Any, minimum: int) -> None:
    """Checks an integer option."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be an integer. Received: {name}={value!r}")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}. Received: {name}={value}")
    if int(value) >= 2**31:
        raise ValueError(f"`{name}` must be less than 2**31. Received: {name}={value}")


def check_real(name: str, value: Any, rule: str, holds: Callable[[Any], bool]) -> None:
    """Checks a number against a rule, which NaN never meets."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be a number. Received: {name}={value!r}")
    if not holds(value):
        raise ValueError(f"`{name}` must be {rule}. Received: {name}={value}")


def check_bool(name: str, value: Any) -> None:
    """Checks a switch."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be a bool. Received: {name}={value!r}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Checks a string against the strings allowed."""
    listed = ", ".join(map(repr, choices))
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be one of {listed}. Received: {name}={value!r}")
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {listed}. Received: {name}={value!r}")


def check_per_head(
    name: str,
    value: Any,
    heads: int | None = None,
    minimum: float = -math.inf,
    maximum: float = math.inf,
) -> None:
    """Checks a number, or a sequence of one number a head, against a range.

    The values of a tensor pass unchecked: they may not exist yet.

    Args:
        name: String, the argument's name.
        value: A number, a list or tuple of numbers, or a tensor.
        heads: Int or `None`. The length that a sequence must have, if known.
        minimum: Float. Smallest value allowed.
        maximum: Float. Largest value allowed.

    Raises:
        ValueError: If a number is outside the range or the length differs from `heads`.
        TypeError: If `value` is neither a number nor a sequence or tensor.
    """
    rule = f"`{name}` must be a number or one number a head"
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        value = value.tolist()
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        entries: Sequence[Any] = [value]
    elif isinstance(value, (list, tuple)):
        entries = value
        if heads is not None and len(value) != heads:
            raise ValueError(f"{rule}, {heads} of them. Received: {name}={value}")
    elif is_tensor(value):
        shape = tuple(value.shape)
        if shape not in ((), (1,), (heads,)):
            raise ValueError(f"{rule}, {heads} of them. Received: {name} of shape {shape}")
        return
    else:
        raise TypeError(f"{rule}. Received: {name}={value!r}")
    for entry in entries:
        if not isinstance(entry, numbers.Real) or isinstance(entry, bool):
            raise TypeError(f"{rule}. Received: {name}={value!r}")
        if not (math.isfinite(entry) and minimum <= float(entry) <= maximum):
            bounded = math.isfinite(minimum) or math.isfinite(maximum)
            bounds = f"in [{minimum:g}, {maximum:g}]" if bounded else "finite"
            raise ValueError(f"`{name}` must be {bounds}. Received: {name}={value}")


def is_tensor(value: Any) -> bool:
    """Whether a value is a tensor of the backend, a variable, or a symbol for one."""
    return isinstance(value, (keras.KerasTensor, keras.Variable)) or ops.is_tensor(value)


def has_values(x: Any) -> bool:
    """Whether a tensor's numbers are known: no symbol stands for them and no compiler traces."""
    if isinstance(x, keras.KerasTensor) or in_symbolic_scope():
        return False
    backend = keras.backend.backend()
    if backend == "torch":
        import torch

        return x.device.type != "meta" and not torch.compiler.is_compiling()
    if backend == "jax":
        import jax

        return not isinstance(x, jax.core.Tracer)
    return backend == "numpy" or hasattr(x, "numpy")  # TensorFlow's symbols have no such method


def as_tensor(name: str, value: Any, kind: str = "float") -> Any:
    """An argument as a tensor.

    Args:
        name: String, the argument's name.
        value: A tensor, a NumPy array, or nested sequences of numbers.
        kind: `"float"`, or `"int"` for whole numbers and bools, or `"any"` for both.

    Raises:
        TypeError: If `value` holds anything but numbers of the kind.
    """
    if not is_tensor(value):
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise TypeError(f"`{name}` must be a tensor. Received: {name}={value!r}") from error
        # Extension types such as bfloat16 are of kind "V" and have no other sign.
        is_number = array.dtype.kind in "fiub" or array.dtype.name.startswith(("bfloat", "float"))
        if value is None or not is_number:
            raise TypeError(
                f"`{name}` must be a tensor. Received: {name}={value!r} of the type "
                f"{type(value).__name__}"
            )
        value = array if isinstance(value, np.ndarray) else _default_precision(array)
        value = ops.convert_to_tensor(value)
    dtype = keras.backend.standardize_dtype(value.dtype)
    is_float = keras.backend.is_float_dtype(dtype)
    if kind != "any" and is_float != (kind == "float"):
        wanted = "a float dtype" if kind == "float" else "an integer dtype or bool"
        raise TypeError(f"`{name}` must be of {wanted}. Received: {name} of {dtype}")
    if isinstance(value, keras.Variable):
        value = ops.convert_to_tensor(value)
    return value


def check_shape(name: str, x: Any, letters: str, *expected: Any) -> None:
    """Checks a tensor's shape wherever sizes are known.

    Args:
        name: String, the argument's name.
        x: Tensor.
        letters: String, the shape as the error writes it, such as `"(B, S)"`.
        *expected: Shapes that are allowed, with `None` for any size.
    """
    shape = tuple(x.shape)
    if any(len(shape) == len(e) and compatible(shape, e) for e in expected):
        return
    shapes = " or ".join(str(tuple(e)) for e in expected)
    raise ValueError(
        f"`{name}` must have shape {letters} = {shapes}. Received: {name} of shape {shape}"
    )


def compatible(shape: Sequence[Any], expected: Sequence[Any]) -> bool:
    """Whether two shapes agree wherever both are known."""
    pairs = zip(shape, expected, strict=True)
    return all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))


def _default_precision(array: np.ndarray) -> np.ndarray:
    """Python's numbers in Keras's default precision, as Keras itself takes them."""
    return array.astype(keras.backend.floatx()) if array.dtype == np.float64 else array
