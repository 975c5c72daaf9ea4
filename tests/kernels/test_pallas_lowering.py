"""The Pallas kernels lowered for GPUs and for TPUs, without either.

Nothing here runs. A TPU's kernels are Mosaic modules, a GPU's are Triton modules, each in a custom
call of the exported program. Triton compiles the latter as XLA would.
"""

import contextlib
import re

import jax
import jax.numpy as jnp
import keras
import pytest
import triton
from jax import export
from jaxlib.mlir import ir
from jaxlib.mlir._mlir_libs import _triton_ext
from triton.backends.compiler import GPUTarget

from keras_rwr import _dispatch as dispatch
from keras_rwr._dispatch import KernelCall
from keras_rwr.backends import jax as backend

TARGETS = {"gpu": ("cuda", r"triton"), "tpu": ("tpu", r"tpu_custom_call")}
R3 = {"reversible": True, "reciprocal_beta": 0.7}
# The options of a call, its head size and its dtype.
CALLS = {
    "R1": ({}, 64, "bfloat16"),
    "R3": (R3, 64, "bfloat16"),
    "R3 both ways": ({**R3, "is_causal": False}, 96, "float32"),
    "R4, long": ({"edge_weight": "exponential", "steps": 25, "dropout": 0.1}, 128, "float16"),
    "single tokens": ({"neighbor_block": 1}, 16, "bfloat16"),
    "heads of 256": ({}, 256, "float32"),
    "large blocks": ({"neighbor_block": 64, "topk": 64, "block_size": 64}, 256, "float32"),
}
SHARED_MEMORY = 227 * 1024  # of a program on an H100 or H200
KERNELS = {
    "weigh_far_edges",
    "attend_locally",
    "spread",
    "step_along_band",
    "collect",
    "step_back_along_band",
    "finish_adjoint",
    "far_edge_gradients",
    "query_gradients",
    "key_gradients",
}


def lowered(target, options, head_size, dtype, monkeypatch, size=1031):
    """The exported program of a call's forward and backward pass, as text."""
    monkeypatch.setattr(backend, "target", target)
    config = KernelCall(**{"is_causal": True, **options})
    shape = (1, size, 2, head_size)

    def loss(query, key, value, discoverability, concentration, mask, neighbors):
        if target == "gpu":
            neighbors = backend.select_neighbors(query, key, config, mask)
        output = backend.rwr_attention(
            query,
            key,
            value,
            config,
            lens_strength=0.3,
            concentration=concentration,
            discoverability=discoverability,
            padding_mask=mask,
            seed=3,
            neighbors=neighbors,
        )
        return output.astype("float32").sum()

    arguments = [jax.ShapeDtypeStruct(shape, dtype)] * 3
    arguments += [jax.ShapeDtypeStruct(x, "float32") for x in ((2, head_size), (2,))]
    arguments.append(jax.ShapeDtypeStruct((1, size), bool))
    arguments.append(jax.ShapeDtypeStruct((1, 2, size, max(config.slots, 1)), "int32"))
    platform, call = TARGETS[target]
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    checks = ("__gpu$xla.gpu.triton", "triton_kernel_call", "triton_kernel_call_ffi")
    with jax.sharding.use_abstract_mesh(mesh) if target == "tpu" else contextlib.nullcontext():
        exported = export.export(
            jax.jit(jax.value_and_grad(loss, range(5))),
            platforms=[platform],
            disabled_checks=[export.DisabledSafetyCheck.custom_call(name) for name in checks],
        )(*arguments)
    text = exported.mlir_module()
    assert re.search(call, text)
    return text


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("target", TARGETS)
def test_lowering(target, name, monkeypatch):
    text = lowered(target, *CALLS[name], monkeypatch)
    found = {kernel for kernel in KERNELS if re.search(rf'"{kernel}"', text)}
    assert found == KERNELS
    assert ("select_blocks" in text) == (target == "gpu")


def test_nothing_is_as_large_as_all_pairs(monkeypatch):
    # The largest array of a program is at most eight times as large for eight times the tokens.
    largest = []
    for size in (1024, 8192):
        text = lowered("gpu", *CALLS["R1"], monkeypatch, size=size)
        shapes = re.findall(r"tensor<((?:\d+x)+)\w+>", text)
        sizes = []
        for shape in shapes:
            count = 1
            for number in shape.rstrip("x").split("x"):
                count *= int(number)
            sizes.append(count)
        largest.append(max(sizes))
    assert largest[0] > 1024 * 64
    assert largest[1] <= 8.0 * largest[0]


# --- what they need of a GPU ---------------------------------------------------------------------


def compile_gpu_kernels(text, folder):
    """What Triton makes of a program's GPU kernels for Hopper, by name; each name has a list."""
    kernels = {}
    attributes = (
        r'ir = "((?:[^"\\]|\\.)*)", name = "(\w+)", '
        r"num_stages = (\d+) : i32, num_warps = (\d+)"
    )
    for code, name, stages, warps in set(re.findall(attributes, text)):
        code = re.sub(r"\\(\\|[0-9A-F]{2})", unescape, code)
        with ir.Context() as context:
            _triton_ext.register_dialect(context)
            module = ir.Module.parse(code.encode("latin-1")).operation.get_asm()
        path = folder / f"{name}.ttir"
        path.write_text(module.replace(f"module @{name}", "module", 1))
        options = {"num_warps": int(warps), "num_stages": int(stages), "enable_fp_fusion": True}
        compiled = triton.compile(str(path), target=GPUTarget("cuda", 90, 32), options=options)
        kernels.setdefault(name, []).append(compiled)
    return kernels


def unescape(match):
    """A character that MLIR wrote as a backslash and two digits, or as two backslashes."""
    return "\\" if match[1] == "\\" else chr(int(match[1], 16))


@pytest.mark.parametrize("name", ["R1", "R3 both ways"])
def test_shared_memory_and_tensor_cores(name, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = compile_gpu_kernels(lowered("gpu", *CALLS[name], monkeypatch), tmp_path)
    assert set(kernels) == {*KERNELS, "select_blocks"}
    for kernel, compiled in kernels.items():
        for one in compiled:
            assert one.metadata.shared <= SHARED_MEMORY, kernel
            if CALLS[name][2] == "bfloat16":
                multiplies = re.search(r"\b(mma\.sync|wgmma\.mma_async)", one.asm["ptx"])
                assert bool(multiplies) == (kernel != "finish_adjoint"), kernel


# --- what they do not take -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"device": "cpu"}, "its kernels run on a GPU"),
        ({"device": "tpu"}, "its kernels lower for a TPU but were never run on one"),
        ({"dtype": "float64"}, "its kernels compute in bfloat16, float16, float32"),
        ({"config": {"fusion": "softmax"}}, "needs the dense rows of the walk"),
        ({"has_graph": True}, "cannot walk on a graph built earlier"),
        ({"query_shape": (1, None, 2, 64)}, "need to know the shape of the query"),
        ({"query_shape": (1, 64, 2, 257)}, "a head size of at most 256"),
        ({"value_size": 300}, "a value size of at most 256"),
        ({"config": {"head_dim_pad": 512}}, "a head size of at most 256"),
        ({"config": {"neighbor_block": 129, "topk": 129}}, "a neighbor_block of at most 128"),
        (
            {"query_shape": (1, 64, 2, 130), "config": {"neighbor_block": 65, "topk": 65}},
            "a neighbor_block of at most 64 with heads beyond 128",
        ),
        ({"query_shape": (64, 2**20, 32, 64)}, "its lists have at most 2147483647 places"),
    ],
)
def test_reasons(changed, reason, monkeypatch):
    monkeypatch.setattr(backend, "target", "gpu")
    facts = {
        "backend": "jax",
        "device": "gpu",
        "dtype": "bfloat16",
        "query_shape": (1, 64, 2, 64),
        "value_size": 64,
        "config": KernelCall(**changed.pop("config", {})),
    }
    assert backend.supports(dispatch.CallSpec(**facts)) is None or not changed
    found = backend.supports(dispatch.CallSpec(**{**facts, **changed}))
    assert reason in found


def test_an_explicit_choice_raises_the_reason():
    from keras_rwr.ops import rwr_attention

    x = jnp.ones((1, 5, 1, 300))
    with pytest.raises(NotImplementedError, match=r"head size of at most 256\. Received: "):
        rwr_attention(x, x, x, implementation="pallas")
    assert keras.backend.backend() == "jax"
