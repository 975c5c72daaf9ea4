"""Launching a kernel in little time."""

import torch
import triton

_compiled: dict = {}


def run(kernel, grid, *arguments, **constants):
    """Launches a kernel, by a short way if it was compiled for such arguments before.

    Triton's own way looks at each argument, makes text of all, and asks the driver about each
    pointer, which takes longer than many of these kernels run.

    Args:
        kernel: Function of `triton.jit`.
        grid: Tuple of one to three ints.
        *arguments: Tensors, numbers and `None`.
        **constants: The kernel's constexprs, all of them, and Triton's options.
    """
    tensor = next(x for x in arguments if isinstance(x, torch.Tensor))
    if not torch.version.cuda or not tensor.is_cuda:
        kernel[grid](*arguments, enable_fp_fusion=True, **constants)
        return
    device = torch.cuda.current_device()
    if device != tensor.device.index:  # Triton launches on the current device
        with torch.cuda.device(tensor.device):
            run(kernel, grid, *arguments, **constants)
        return
    numbers = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments]
    # What Triton compiles for anew, and more.
    kinds = [
        x if x is number else (x.dtype, number % 16)
        for x, number in zip(arguments, numbers, strict=True)
    ]
    key = (kernel.fn, device, *constants.values(), *kinds)
    known = _compiled.get(key)
    if known is None:
        # Triton fuses multiplication and addition anyway, but wants to be told.
        compiled = kernel[grid](*arguments, enable_fp_fusion=True, **constants)
        names = kernel.arg_names[len(arguments) :]
        _compiled[key] = compiled, tuple(constants[name] for name in names)
        return
    compiled, in_order = known
    if is_watched():
        compiled[(*grid, 1, 1)[:3]](*arguments, *in_order)
        return
    # As `compiled[grid]` does, without its questions.
    compiled.run(
        *(*grid, 1, 1)[:3],
        triton.runtime.driver.active.get_current_stream(device),
        compiled.function,
        compiled.packed_metadata,
        None,
        None,
        None,
        *numbers,
        *in_order,
    )


def is_watched():
    """Whether somebody, such as a profiler, wants to be told of each launch."""
    hook = triton.knobs.runtime.launch_enter_hook  # a chain of hooks, most often an empty one
    return bool(getattr(hook, "calls", hook))


def next_power_of_2(x):
    return 1 << (x - 1).bit_length()


def ceil_div(x, y):
    return (x + y - 1) // y
