"""The inputs and masks that self-attention takes."""

from keras import ops

from keras_rwr.tensors import compatible


def check_sequences(query_shape, value_shape, key_shape=None):
    """Checks that the inputs can be one sequence of shape `(B, S, dim)`."""
    shapes = {"query": tuple(query_shape), "value": tuple(value_shape)}
    if key_shape is not None:
        shapes["key"] = tuple(key_shape)
    for name, shape in shapes.items():
        if len(shape) != 3:
            raise ValueError(
                f"`{name}` must have shape (B, S, dim). Received: {name} of shape {shape}"
            )
    for name, shape in shapes.items():
        if not compatible(shape[:2], shapes["query"][:2]):
            raise ValueError(
                f"`query` and `{name}` must be the same sequence, of one batch size and length: "
                "RWR attention is self-attention. "
                f"Received: query of shape {shapes['query']}, {name} of shape {shape}"
            )


def check_mask(name, mask, query):
    """Checks that a mask says which tokens of `query` are padding, and nothing else."""
    if mask is None:
        return
    shape = tuple(mask.shape)
    batch, length = query.shape[:2]
    rules = "(B, S)"
    if name == "attention_mask":
        rules = "(B, S) or (B, 1, S): RWR attention takes padding masks and `use_causal_mask`"
        # The middle axis must be known to be 1.
        if len(shape) == 3 and shape[1] == 1:
            shape = (shape[0], shape[2])
    # A mask of one row serves the whole batch.
    if len(shape) == 2 and compatible(shape, (1 if shape[0] == 1 else batch, length)):
        return
    raise ValueError(
        f"`{name}` must have shape {rules}. Received: {name} of shape {tuple(mask.shape)} for "
        f"query of shape {tuple(query.shape)}"
    )


def merge_masks(query, **masks):
    """Joins all masks into one padding mask `(B, S)`, true at real tokens, or `None`."""
    merged = None
    seen = []
    for name, mask in masks.items():
        check_mask(name, mask, query)
        if mask is None or any(mask is other for other in seen):
            continue
        seen.append(mask)
        mask = ops.cast(mask, "bool")
        if len(mask.shape) == 3:
            mask = ops.squeeze(mask, axis=1)
        merged = mask if merged is None else ops.logical_and(merged, mask)
    if merged is None:
        return None
    return ops.broadcast_to(merged, ops.shape(query)[:2])
