"""How each framework compiles, differentiates, waits and counts memory."""

import contextlib
import gc
import importlib
import itertools
import os
import pathlib
import platform
import resource
import sys
import time

import keras

from benchmarks import cases


class OutOfMemoryError(RuntimeError):
    """An accelerator has not enough memory, in a framework without an exception of its own."""


class Framework:
    """What the runner needs of the active Keras backend.

    Attributes:
        name: String, the Keras backend.
        variants: Tuple of strings, the ways to run a function; the first ones are the default.
        default_variants: Tuple of strings.
    """

    name: str
    variants: tuple[str, ...]
    default_variants: tuple[str, ...]
    resets_peak = False  # of an accelerator's memory, within a process
    out_of_memory: tuple[type[Exception], ...] = ()  # what an accelerator without memory raises

    def prepare(self, function, arrays, cotangent, variant):
        """Makes a call without arguments out of a function.

        Args:
            function: Function of tensors that returns one tensor.
            arrays: List of tensors, its arguments.
            cotangent: `None` for the forward pass alone, or tensor of the output's shape.
            variant: String, one of `variants`.

        Returns:
            A function that returns a list: the output and, with a cotangent, the gradients of
            `arrays`.
        """
        raise NotImplementedError

    def layer_function(self, layer, **arguments):
        """A layer as a function of its input and its weights, and the weights."""
        weights = [variable.value for variable in layer.trainable_variables]
        return (lambda x, *weights: layer(x, x, **arguments)), weights

    def exact(self):
        """A context in which float32 products are of float32 factors, whatever the inputs are."""
        return contextlib.nullcontext()

    def normal_numbers(self):
        """A function that draws what `make_inputs` takes, from the same seed each time."""
        return cases.normal_numbers()

    def release(self):
        """Gives accelerator memory that nothing holds back to the device."""

    def wait(self, result):
        """Returns when the result has been computed."""
        raise NotImplementedError

    def seconds(self, call, number):
        """Seconds that one of `number` calls in a row takes."""
        started = time.perf_counter()
        for _ in range(number):
            result = call()
        self.wait(result)
        return (time.perf_counter() - started) / number

    def device_name(self, device):
        """What the device calls itself."""
        raise NotImplementedError

    def device_peak(self):
        """Largest number of bytes allocated on the accelerator so far."""
        raise NotImplementedError

    def reset_peak(self):
        """Lets `device_peak` start anew, at what is allocated now."""
        raise NotImplementedError

    def version(self):
        return importlib.import_module(self.name).__version__


class Torch(Framework):
    name = "torch"
    variants = ("eager", "compile", "cudagraph")
    default_variants = ("eager",)
    resets_peak = True

    @property
    def out_of_memory(self):
        import torch

        return (torch.OutOfMemoryError,)

    def prepare(self, function, arrays, cotangent, variant):
        import torch

        if variant == "compile":
            function = torch.compile(function)
        for x in arrays if cotangent is not None else ():
            x.requires_grad_()

        def call():
            if cotangent is None:
                with torch.no_grad():
                    return [function(*arrays)]
            output = function(*arrays)
            return [output, *torch.autograd.grad(output, arrays, cotangent)]

        return self.capture(call) if variant == "cudagraph" else call

    @staticmethod
    def capture(call):
        """The replay of a call's kernels as a CUDA graph."""
        import torch

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, and makes what libraries keep
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()

        def replay():
            graph.replay()
            return result

        return replay

    def is_on_gpu(self):
        return keras.src.backend.torch.core.get_device().startswith("cuda")

    def normal_numbers(self):
        import torch

        if not self.is_on_gpu():
            return super().normal_numbers()
        generator = torch.Generator("cuda").manual_seed(cases.SEED)
        return lambda *shape: torch.randn(*shape, device="cuda", generator=generator)

    def release(self):
        import torch

        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def wait(self, result):
        import torch

        if result[0].is_cuda:
            torch.cuda.synchronize()

    def seconds(self, call, number):
        import torch

        if not self.is_on_gpu():
            return super().seconds(call, number)
        torch.cuda.synchronize()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(number):
            call()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3 / number

    def device_name(self, device):
        import torch

        return torch.cuda.get_device_name() if device == "gpu" else cpu_name()

    def device_peak(self):
        import torch

        return torch.cuda.max_memory_allocated()

    def reset_peak(self):
        import torch

        torch.cuda.reset_peak_memory_stats()


class Jax(Framework):
    name = "jax"
    variants = ("jit",)
    default_variants = ("jit",)
    out_of_memory = (OutOfMemoryError,)

    def prepare(self, function, arrays, cotangent, variant):
        import jax

        # On GPUs a float32 product is one of TF32 factors unless it is said otherwise.
        is_full = arrays[0].dtype == "float32"
        precision = "highest" if is_full else jax.config.jax_default_matmul_precision

        @jax.jit
        def run(arrays, cotangent):
            with jax.default_matmul_precision(precision):
                if cotangent is None:
                    return [function(*arrays)]
                output, pullback = jax.vjp(function, *arrays)
                return [output, *pullback(cotangent)]

        def call():
            with self.telling_out_of_memory():
                return run(arrays, cotangent)

        return call

    def exact(self):
        import jax

        return jax.default_matmul_precision("highest")  # which `prepare` reads

    @staticmethod
    @contextlib.contextmanager
    def telling_out_of_memory():
        """Raises `OutOfMemoryError` where jax raises what it raises for anything else, too."""
        import jax

        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise OutOfMemoryError(str(error)) from error

    def normal_numbers(self):
        import jax

        if jax.default_backend() == "cpu":
            return super().normal_numbers()
        keys = map(jax.random.key, itertools.count(cases.SEED))
        return lambda *shape: jax.random.normal(next(keys), shape)

    def layer_function(self, layer, **arguments):
        weights = [variable.value for variable in layer.trainable_variables]
        state = [variable.value for variable in layer.non_trainable_variables]

        def function(x, *weights):
            return layer.stateless_call(weights, state, x, x, **arguments)[0]

        return function, weights

    def wait(self, result):
        import jax

        with self.telling_out_of_memory():
            jax.block_until_ready(result)

    def device_name(self, device):
        import jax

        return cpu_name() if device == "cpu" else jax.devices()[0].device_kind

    def device_peak(self):
        import jax

        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]


class TensorFlow(Framework):
    name = "tensorflow"
    variants = ("graph", "xla")
    default_variants = ("graph", "xla")

    def prepare(self, function, arrays, cotangent, variant):
        import tensorflow as tf

        # On GPUs a float32 product is one of TF32 factors unless it is said otherwise.
        tf.config.experimental.enable_tensor_float_32_execution(arrays[0].dtype != tf.float32)

        @tf.function(jit_compile=variant == "xla")
        def run(arrays, cotangent):
            if cotangent is None:
                return [function(*arrays)]
            with tf.GradientTape() as tape:
                tape.watch(arrays)
                output = function(*arrays)
            return [output, *tape.gradient(output, arrays, cotangent)]

        return lambda: run(arrays, cotangent)

    def wait(self, result):
        import tensorflow as tf

        tf.test.experimental.sync_devices()

    def device_name(self, device):
        import tensorflow as tf

        if device == "cpu":
            return cpu_name()
        details = tf.config.experimental.get_device_details(
            tf.config.list_physical_devices("GPU")[0]
        )
        return details.get("device_name", "GPU")

    def device_peak(self):
        import tensorflow as tf

        return tf.config.experimental.get_memory_info("GPU:0")["peak"]


FRAMEWORKS = {framework.name: framework for framework in (Torch(), Jax(), TensorFlow())}


def active():
    """The `Framework` of the active Keras backend.

    Raises:
        ValueError: If there is none for it.
    """
    name = keras.backend.backend()
    if name not in FRAMEWORKS:
        raise ValueError(
            f"KERAS_BACKEND must be one of {', '.join(FRAMEWORKS)}. Received: KERAS_BACKEND={name}"
        )
    return FRAMEWORKS[name]


def cpu_name():
    """The processor's model, and the number of cores that this process may use."""
    model = platform.processor()
    info = pathlib.Path("/proc/cpuinfo")
    if info.is_file():
        models = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        if models:
            model = models[0].partition(":")[2].strip()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores"


def resident_bytes():
    """Bytes of memory that this process holds now, and the most that it has held.

    Linux tells both for this program alone. `getrusage` would count what the process held before
    it started this program, too, and elsewhere it is all there is: then both are its peak.
    """
    status = pathlib.Path("/proc/self/status")
    if status.is_file():
        lines = dict(x.split(":", 1) for x in status.read_text().splitlines())
        return tuple(int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peak, peak
