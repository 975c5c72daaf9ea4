"""The machine code of the shipped kernels, compiled without a GPU: tensor cores, and no spills.

The backend runs on tensors in main memory, and each launch is compiled instead of run, with the
arguments, tiles and options that it would be launched with.
"""

import contextlib
import functools
import re
import subprocess

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from keras_rwr.backends import torch as backend
from keras_rwr.backends.torch import select as select_kernels
from keras_rwr.ops import rwr_attention

HOPPER = GPUTarget("cuda", 90, 32)
MI300 = GPUTarget("hip", "gfx942", 64)
SHARED_MEMORY = {"cuda": 227 * 1024, "hip": 64 * 1024}

# Kernels that multiply tiles, and those that have nothing to multiply.
PRODUCTS = {
    "_keep_groups",
    "_weigh_kernel",
    "_weigh_gradient_kernel",
    "_forward",
    "_query_gradients",
    "_key_gradients",
    "_step",
    "_adjoint_step",
    "_band_dot",
    "_multiply",
}
NO_PRODUCTS = {
    "_find_ends_kernel",
    "_unit_kernel",
    "_unit_gradient_kernel",
    "_choose",
    "_start",
    "_far_dot",
}
# Bytes of a thread that 255 registers have no room for, by head size. No other kernel spills.
SPILLS = {
    64: {"_keep_groups": 32, "_weigh_gradient_kernel": 32, "_adjoint_step": 64},
    128: {
        "_keep_groups": 32,
        "_weigh_gradient_kernel": 32,
        "_key_gradients": 96,
        "_step": 400,
        "_adjoint_step": 96,
    },
}


class Device:
    """What Triton asks a driver for in order to compile."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        # Compiled kernels are kept by device.
        return str(self.target)

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def compiling(target):
    """Compiles what is launched, for `target`, into the list that it gives."""
    kernels = []
    launch = JITFunction.run

    def run(function, *arguments, grid, warmup, **options):
        kernels.append(launch(function, *arguments, grid=grid, warmup=True, **options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", Device(target))
        patch.setattr(JITFunction, "run", run)
        yield kernels


@pytest.fixture(autouse=True, scope="module")
def fresh_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@functools.cache
def compile_attention(target, head_size, is_causal=True):
    """The kernels of R5 with one step, in bfloat16, forward and backward, by name."""
    shape = (1, 512, 4, head_size)
    tensors = {
        **{name: torch.zeros(shape, dtype=torch.bfloat16) for name in ("query", "key", "value")},
        "graph_query": torch.zeros((1, 512, 1, 64), dtype=torch.bfloat16),
        "graph_key": torch.zeros((1, 512, 1, 64), dtype=torch.bfloat16),
        "hop_weights": torch.zeros((1, 512, 4, 2)),
    }
    options = {"topk": 8, "neighbor_block": 1, "edge_weight": "exponential", "self_edges": False}
    with pytest.MonkeyPatch.context() as patch, compiling(target) as kernels:
        patch.setattr(backend, "supports", lambda spec: None)
        if target is MI300:
            patch.setattr(select_kernels, "_PRECISION", "ieee")
        for x in tensors.values():
            x.requires_grad_()
        output = rwr_attention(
            **tensors, steps=1, is_causal=is_causal, implementation="triton", **options
        )
        output.sum().backward()
    by_name = {}
    for kernel in kernels:
        by_name.setdefault(kernel.metadata.name, []).append(kernel)
    return by_name


def tensor_core_instructions(kernel):
    return len(re.findall(r"\bH(?:G)?MMA\b", kernel.asm["sass"]))


def spilled_bytes(kernel, tmp_path):
    """Bytes of a thread that live in memory for want of registers."""
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(binary)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage)
    assert len(used) == 2, usage
    return sum(map(int, used))


@pytest.mark.parametrize("head_size", [64, 128])
def test_hopper(head_size, tmp_path):
    compiled = compile_attention(HOPPER, head_size)
    assert set(compiled) == PRODUCTS | NO_PRODUCTS
    for name, kernels in compiled.items():
        # Far edges alone are no product of tiles.
        assert any(map(tensor_core_instructions, kernels)) == (name in PRODUCTS), name
        for kernel in kernels:
            assert spilled_bytes(kernel, tmp_path) <= SPILLS[head_size].get(name, 0), name
            assert kernel.metadata.shared <= SHARED_MEMORY["cuda"], name


def test_amd():
    compiled = compile_attention(MI300, 64, is_causal=False)
    assert set(compiled) == PRODUCTS | NO_PRODUCTS - {"_find_ends_kernel"}
    for name, kernels in compiled.items():
        codes = [kernel.asm["amdgcn"] for kernel in kernels]
        assert any("v_mfma_" in code for code in codes) == (name in PRODUCTS), name
        for kernel in kernels:
            assert kernel.metadata.shared <= SHARED_MEMORY["hip"], name


# --- the checks can fail -------------------------------------------------------------------------


@triton.jit
def square(x_ptr, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    tile = tl.load(x_ptr + rows * SIZE + columns)
    tl.store(x_ptr + rows * SIZE + columns, tl.dot(tile, tile))


@triton.jit
def double(x_ptr, SIZE: tl.constexpr):
    positions = tl.arange(0, SIZE)
    tl.store(x_ptr + positions, 2.0 * tl.load(x_ptr + positions))


def compile_one(kernel, dtype, **options):
    with compiling(HOPPER) as kernels:
        kernel[(1,)](torch.zeros(16384, dtype=dtype), SIZE=128, enable_fp_fusion=True, **options)
    return kernels[0]


def test_spills_are_noticed(tmp_path):
    assert spilled_bytes(compile_one(square, torch.bfloat16, num_warps=8), tmp_path) == 0
    assert spilled_bytes(compile_one(square, torch.bfloat16, num_warps=1), tmp_path) > 100


def test_missing_tensor_cores_are_noticed():
    assert tensor_core_instructions(compile_one(square, torch.bfloat16)) > 0
    assert tensor_core_instructions(compile_one(double, torch.float32)) == 0
