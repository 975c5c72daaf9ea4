"""The ablation of RWR attention in GPT-2: R0, the stock model, to R4.

Each step names what it adds to the one before it, so that a difference in validation loss can be
read as the worth of that part.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


@dataclasses.dataclass(frozen=True)
class Step:
    """One model of the ablation.

    Args:
        name: String, "R0" to "R4".
        description: String, what it is in one line.
        options: `None` for stock attention, or a mapping with the options of `RWRGPT2Backbone`
            that define the step.
    """

    name: str
    description: str
    options: Mapping[str, Any] | None

    def __post_init__(self):
        if self.options is not None:
            object.__setattr__(self, "options", MappingProxyType(dict(self.options)))


_R1 = {"alpha": 0.2, "steps": 4, "topk": 32, "window": 128, "lens_strength": 0.3}
_R2 = {**_R1, "reversible": True, "reciprocal_beta": 0.5}
_R3 = {**_R2, "reciprocal_beta": 0.7, "use_discoverability": True}
_R4 = {**_R1, "edge_weight": "exponential"}

STEPS: Mapping[str, Step] = MappingProxyType(
    {
        step.name: step
        for step in (
            Step("R0", "stock GPT-2 attention", None),
            Step("R1", "RWR attention with its defaults", _R1),
            Step("R2", "R1 + reversible walk", _R2),
            Step("R3", "R2 with reciprocal beta 0.7 + discoverability", _R3),
            Step("R4", "R1 + exponential edges", _R4),
        )
    }
)


def step_options(step, overrides=None):
    """The RWR options of a step.

    Args:
        step: String, a key of `STEPS`.
        overrides: `None` or mapping of options that replace or add to the step's.

    Returns:
        A dict of options for `RWRGPT2Backbone`, or `None` for stock attention.

    Raises:
        ValueError: If there is no such step, or R0 is given overrides.
    """
    if step not in STEPS:
        raise ValueError(f"`step` must be one of {', '.join(STEPS)}. Received: step={step!r}")
    options = STEPS[step].options
    if overrides is None:
        overrides = {}
    if options is None:
        if overrides:
            raise ValueError(
                f"`overrides` must be empty for {step}, which has stock attention. "
                f"Received: overrides={dict(overrides)}"
            )
        return None
    return {**options, **overrides}


def build_backbone(step, overrides=None, **arguments):
    """Builds the GPT-2 backbone of an ablation step.

    Args:
        step: String, a key of `STEPS`.
        overrides: `None` or mapping of RWR options that replace or add to the step's.
        **arguments: Arguments of `keras_hub.models.GPT2Backbone`, such as `vocabulary_size`.

    Returns:
        A `keras_hub.models.GPT2Backbone` for R0, else a `keras_rwr.models.RWRGPT2Backbone`.

    Raises:
        ValueError: If there is no such step, or an option does not fit.

    Example:

    ```python
    backbone = keras_rwr.ablation.build_backbone(
        "R4",
        overrides={"window": 32},
        vocabulary_size=4096,
        num_layers=4,
        num_heads=4,
        hidden_dim=128,
        intermediate_dim=512,
        max_sequence_length=256,
    )
    ```
    """
    options = step_options(step, overrides)
    # Imported here so that STEPS can be read without KerasHub.
    if options is None:
        from keras_hub.models import GPT2Backbone

        return GPT2Backbone(**arguments)
    from keras_rwr.models import RWRGPT2Backbone

    return RWRGPT2Backbone(**arguments, **options)
