"""Framework-native kernels of RWR attention, one subpackage a framework.

Installed as `keras_rwr.backends`. `keras_rwr._dispatch` reaches a subpackage by its name, and
imports it when its framework is the active backend; the subpackage imports its kernels when they
first run. Subpackages never import one another.

A subpackage (`torch`, `jax`) offers `supports(spec) -> str | None`: a pure function of a call's
device, dtype, static shapes and options. `None` means that the kernels can run the call, a string
is the reason why they cannot. It compiles nothing, allocates nothing, and never tries a kernel to
see whether it raises.

Beside it `torch` has

- `stages() -> dict`: functions by name that take the place of those of
  `keras_rwr._dispatch.Stages`, with the same arguments and results.

`jax`, whose kernels run R1 to R4 as a whole, has

- `rwr_attention(query, key, value, config, *, lens_strength, concentration, discoverability,
  padding_mask, seed, neighbors)`: the differentiable operation on the framework's own tensors,
  `(B, S, N, H)` in and `(B, S, N, V)` out. `neighbors` are the numbers of the key blocks that each
  query links to. `seed` is `None`, an int, or an int tensor of shape `(2,)` or `(4,)`, see
  `keras_rwr._dropout`.
- `select_neighbors(query, key, config, padding_mask)`: the choice of these blocks, by the rule of
  `keras_rwr._select.select`.
"""
