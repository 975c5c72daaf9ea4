"""RWR attention in Triton, for torch on NVIDIA and AMD GPUs: a kernel for each stage.

`vectors`, `select`, `weigh`, `walk` and `local` are the stages, each with its kernels, their
launches and their gradients; `product` is the sparse matrix under them. All are in memory linear in
the number of tokens. `operators` says how torch sees the kernels, `run` how they are launched.
"""

import importlib.util
import os

_HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton's own switch: kernels run on the CPU, step by step, to be tested.
_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DTYPES = ("float16", "float32") if _IS_INTERPRETED else ("bfloat16", "float16", "float32")
_LARGEST_HEAD = 256
_LARGEST_GRAPH = {"float32": 256, "bfloat16": 512, "float16": 512}


def supports(spec):
    """Why the kernels cannot run a call, or `None`."""
    if not _HAS_TRITON:
        return "Triton is not installed"
    if spec.device != ("cpu" if _IS_INTERPRETED else "gpu"):
        where = "the CPU, where TRITON_INTERPRET=1 is set" if _IS_INTERPRETED else "a GPU"
        return f"its kernels run on {where}"
    if spec.dtype not in _DTYPES:
        return f"its kernels compute in {', '.join(_DTYPES)}"
    if spec.config.fusion != "sum":
        return f'fusion "{spec.config.fusion}" needs the dense rows of the walk'
    for name, size, largest in (
        ("head size", spec.query_shape[-1], _LARGEST_HEAD),
        ("value size", spec.value_size, _LARGEST_HEAD),
        ("graph_dim", spec.graph_size, _LARGEST_GRAPH[spec.dtype]),
    ):
        if size is not None and size > largest:
            return f"its tiles hold a {name} of at most {largest}"
    return None


def stages():
    """The stages by name, see `keras_rwr._dispatch.Stages`."""
    from keras_rwr.backends.torch import local, select, vectors, walk, weigh

    return {
        "contain": vectors.contain,
        "unit": vectors.unit,
        "select": select.select,
        "weigh": weigh.weigh,
        "walk": walk.walk,
        "attend_locally": local.attend_locally,
    }
