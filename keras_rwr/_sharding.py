"""More than one device: each works on its own batch entries and heads.

RWR attention of one batch entry and head needs nothing of the others, but an implementation may
fold these axes into others, where a compiler's partitioner loses sight of them and gathers whole
tensors on every device. Under a `keras.distribution` of the jax backend, `over_devices` divides
the work by hand.
"""

import functools
from collections.abc import Callable
from typing import Any

import keras
from keras import ops, tree

from keras_rwr._dropout import seed_words

Tensor = Any


def over_devices(function: Callable, layouts: Any, out_layouts: Any, *static: Any) -> Callable:
    """Runs a function on the slice of batch and heads that each device holds.

    Under a `keras.distribution` of the jax backend the function runs in `jax.shard_map`: the batch
    axis is divided over the distribution's batch axis, the heads over the mesh's other axes, each
    if its size is a multiple of theirs. What is not divided is computed on every device. Elsewhere,
    and within such a function, nothing is divided.

    Args:
        function: Function `function(*static, *args)` of a module, from tensors to tensors: a tensor
            or a nest of tuples for each argument and for the result. It must treat batch entries
            and heads independently of one another, and hold no tensors of its own.
        layouts: Tuple with a layout for each of `args`: a string with a letter for each axis, `b`
            for batch and `n` for heads, such as `"bsnh"`, or a nest of tuples of them. A tensor
            may be `None`; where its batch or heads have size 1, every device gets them.
        out_layouts: Layout of what `function` returns, in which `b` and `n` have their full size.
        *static: Hashable first arguments of `function`.

    Returns:
        Function of `args`.

    Example:

    ```python
    run = over_devices(attend, ("bsnh", "bsnh", "bs"), "bsnh", config)
    output = run(query, key, padding_mask)  # attend(config, query, key, padding_mask)
    ```
    """
    if not is_active():
        return functools.partial(function, *static)
    distribution = keras.distribution.distribution()
    mesh = distribution.device_mesh.backend_mesh
    return _divided(function, layouts, out_layouts, static, mesh, distribution.batch_dim_name)


def is_active() -> bool:
    """Whether `over_devices` divides work over devices here."""
    if keras.backend.backend() != "jax" or keras.distribution.distribution() is None:
        return False
    import jax

    return not jax.sharding.get_abstract_mesh().manual_axes


@functools.lru_cache
def _divided(
    function: Callable, layouts: Any, out_layouts: Any, static: tuple, mesh: Any, batch_name: str
) -> Callable:
    """The function to call, the same one for the same call: tracing and compiling take long."""
    import jax

    head_names = tuple(name for name in mesh.axis_names if name != batch_name)

    def run(*args: Any) -> Any:
        arrays = tree.flatten(args)
        shapes = [() if x is None else x.shape for x in arrays]
        inputs = list(zip(tree.flatten(layouts), shapes, strict=True))
        names = {
            "b": _dividing(_size("b", inputs), (batch_name,), mesh),
            "n": _dividing(_size("n", inputs), head_names, mesh),
        }

        def spec(layout: str, shape: Any = None) -> Any:
            axes = [names.get(letter) for letter in layout]
            for axis, size in enumerate(shape or ()):
                axes[axis] = None if size == 1 else axes[axis]
            return jax.sharding.PartitionSpec(*axes)

        # `None` is no tensor to jax: it comes back where it was.
        return jax.shard_map(
            lambda *arrays: function(*static, *tree.pack_sequence_as(args, arrays)),
            mesh=mesh,
            in_specs=tuple(spec(layout, shape) for layout, shape in inputs),
            out_specs=tree.map_structure(spec, out_layouts),
            check_vma=False,
        )(*arrays)

    return jax.jit(run)


def _size(letter: str, inputs: list) -> int:
    """Size of an axis, 1 if unknown; tensors that have 1 there serve all of it."""
    sizes = {shape[layout.index(letter)] for layout, shape in inputs if letter in layout and shape}
    sizes.discard(1)
    size = sizes.pop() if len(sizes) == 1 else 1
    return size if isinstance(size, int) else 1


def _dividing(size: int, names: tuple, mesh: Any) -> Any:
    """Those of the mesh's axes that together divide an axis evenly, or `None`."""
    dividing: list[str] = []
    parts = 1
    for name in names:
        if size % (parts * mesh.shape[name]) == 0:
            dividing.append(name)
            parts *= mesh.shape[name]
    return tuple(dividing) or None


_THETA_LAYOUTS = {0: "", 1: "t", 2: "nt", 4: "bsnt"}


def attend_over_devices(attend: Callable, inputs: Any, *static: Any) -> Tensor:
    """Runs `keras_rwr._attend.attend` where each device has batch entries and heads of its own.

    Args:
        attend: The function.
        inputs: `keras_rwr._attend.Inputs`.
        *static: Its other arguments.
    """
    tensors = _with_shared_heads_repeated(inputs)
    for name in ("concentration", "lens_strength"):
        tensors[name] = ops.reshape(ops.convert_to_tensor(tensors[name]), (-1,))
    seed, positions = tensors.pop("seed"), (None, None)
    if seed is not None:
        seed = seed_words(seed)
        starts = seed[2:] if seed.shape[0] == 4 else (0, 0)
        sizes = (inputs.query.shape[0], inputs.query.shape[2])
        positions = tuple(
            start + ops.arange(size, dtype="int32")
            for start, size in zip(starts, sizes, strict=True)
        )
    layouts = {
        **dict.fromkeys(("query", "key", "value", "graph_query", "graph_key"), "bsnh"),
        **dict.fromkeys(("concentration", "lens_strength"), "n"),
        "discoverability": "nh",
        "hop_weights": _THETA_LAYOUTS[_rank(tensors["hop_weights"])],
        **dict.fromkeys(("padding_mask", "segment_ids"), "bs"),
    }
    names = tuple(layouts)
    run = over_devices(
        _attend_on_device,
        (*layouts.values(), "w", "b", "n"),
        "bsnh",
        attend,
        type(inputs),
        names,
        static,
    )
    return run(*(tensors[name] for name in names), seed, *positions)


def _attend_on_device(
    attend: Callable, cls: type, names: tuple, static: tuple, *tensors: Tensor
) -> Tensor:
    *rest, seed, entries, heads = tensors
    if seed is not None:
        seed = ops.concatenate([seed[:2], entries[:1], heads[:1]])
    return attend(cls(**dict(zip(names, rest, strict=True)), seed=seed), *static)


def _with_shared_heads_repeated(inputs: Any) -> dict[str, Tensor]:
    """The tensors, keys and values and graphs of each head its own where heads share them.

    A device has some of the query heads and needs what these share: graphs that are shared by all
    heads stay one, as over_devices gives axes of size 1 to every device.
    """
    tensors = inputs.tensors()
    del tensors["graph"]
    heads = inputs.query.shape[2]
    for name in ("key", "value", "graph_query", "graph_key"):
        x = tensors[name]
        if x is not None and x.shape[2] not in (1, heads):
            tensors[name] = ops.repeat(x, heads // x.shape[2], axis=2)
    graphs = None if inputs.graph_query is None else inputs.graph_query.shape[2]
    if graphs not in (None, 1, heads):
        for name in ("concentration", "discoverability"):
            x = tensors[name]
            if ops.is_tensor(x) and x.shape and x.shape[0] == graphs:
                tensors[name] = ops.repeat(x, heads // graphs, axis=0)
    return tensors


def _rank(x: Tensor) -> int:
    return 0 if x is None else len(x.shape)
