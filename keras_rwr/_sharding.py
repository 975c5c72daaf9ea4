"""More than one device: each works on its own batch entries and heads.

RWR attention of one batch entry and head needs nothing of the others, but an implementation may
fold these axes into others, where a compiler's partitioner loses sight of them and gathers whole
tensors on every device. Under a `keras.distribution` of the jax backend, `over_devices` divides
the work by hand.
"""

import functools

import keras
from keras import tree


def over_devices(function, layouts, out_layouts, *static):
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


def is_active():
    """Whether `over_devices` divides work over devices here."""
    if keras.backend.backend() != "jax" or keras.distribution.distribution() is None:
        return False
    import jax

    return not jax.sharding.get_abstract_mesh().manual_axes


@functools.lru_cache
def _divided(function, layouts, out_layouts, static, mesh, batch_name):
    """The function to call, the same one for the same call: tracing and compiling take long."""
    import jax

    head_names = tuple(name for name in mesh.axis_names if name != batch_name)

    def run(*args):
        arrays = tree.flatten(args)
        shapes = [() if x is None else x.shape for x in arrays]
        inputs = list(zip(tree.flatten(layouts), shapes, strict=True))
        names = {
            "b": _dividing(_size("b", inputs), (batch_name,), mesh),
            "n": _dividing(_size("n", inputs), head_names, mesh),
        }

        def spec(layout, shape=None):
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


def _size(letter, inputs):
    """Size of an axis, 1 if unknown; tensors that have 1 there serve all of it."""
    sizes = {shape[layout.index(letter)] for layout, shape in inputs if letter in layout and shape}
    sizes.discard(1)
    size = sizes.pop() if len(sizes) == 1 else 1
    return size if isinstance(size, int) else 1


def _dividing(size, names, mesh):
    """Those of the mesh's axes that together divide an axis evenly, or `None`."""
    dividing, parts = [], 1
    for name in names:
        if size % (parts * mesh.shape[name]) == 0:
            dividing.append(name)
            parts *= mesh.shape[name]
    return tuple(dividing) or None
