"""Framework-native kernels of RWR attention, one subpackage a framework.

Installed as `keras_rwr.backends`. This package knows no Keras and imports nothing from the rest of
`keras_rwr`: pure tensors of one framework go in, pure tensors come out. `keras_rwr.dispatch`
reaches a subpackage by its name, and imports it when its framework is the active backend; the
subpackage imports its kernels when they first run.

A subpackage (`torch`, `jax`, `tensorflow`) offers

- `supports(spec) -> str | None`: a pure function of a call's device, dtype, static shapes and
  options. `None` means that the kernels can run the call, a string is the reason why they cannot.
  It compiles nothing, allocates nothing, and never tries a kernel to see whether it raises.
- `rwr_attention(query, key, value, config, *, lens_strength, concentration, discoverability,
  padding_mask, seed, neighbors, graph)`: the differentiable operation on the framework's own
  tensors, `(B, S, N, H)` in and `(B, S, N, V)` out. `neighbors`, the numbers of the key blocks
  that each query links to, were chosen outside, so that no two implementations differ at a
  near-tie. `seed` is `None`, an int, or an int tensor of shape `(2,)` or `(4,)`; of four numbers
  the last two are added to the numbers of batch entries and heads in dropout's hash, because the
  call is one device's part of a larger one. See `keras_rwr._dropout`.
- optionally `select_neighbors(query, key, config, padding_mask)`: a kernel for that choice, with
  the result of `keras_rwr.graph.select_neighbors`.

Subpackages never import one another, and importing `keras_rwr` imports none of them.
"""
