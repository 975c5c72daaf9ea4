"""The ablation of RWR attention in GPT-2: R0, the stock model, to R5.

Steps R1 to R4 name what they add to an earlier one, so that a difference in validation loss can be
read as the worth of that part. R5 is the model that we recommend.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from keras_rwr._checks import check_choice

__all__ = ["STEPS", "Step", "build_backbone", "step_options"]


@dataclasses.dataclass(frozen=True)
class Step:
    """One model of the ablation.

    Args:
        name: String, "R0" to "R5".
        description: String, what it is in one line.
        options: `None` for stock attention, or a mapping with the options of `RWRGPT2Backbone`
            that define the step.
        layers: `"all"` (the default), or `"every second"`: layers 1, 3, 5, … of those numbered
            from 0 walk, and the others are LOCAL alone.
    """

    name: str
    description: str
    options: Mapping[str, Any] | None
    layers: str = "all"

    def __post_init__(self) -> None:
        if self.options is not None:
            object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    def rwr_layers(self, num_layers: int) -> list[int] | None:
        """The argument `rwr_layers` of a model with so many layers.

        Raises:
            ValueError: If no layer would walk.
        """
        if self.layers == "all":
            return None
        if num_layers < 2:
            raise ValueError(
                f"`num_layers` must be at least 2 for {self.name}, in which every second layer "
                f"walks. Received: num_layers={num_layers}"
            )
        return list(range(1, num_layers, 2))


_R1 = {"alpha": 0.2, "steps": 4, "topk": 32, "window": 128, "lens_strength": 0.3}
_R2 = {**_R1, "reversible": True, "reciprocal_beta": 0.5}
_R3 = {**_R2, "reciprocal_beta": 0.7, "use_discoverability": True}
_R4 = {**_R1, "edge_weight": "exponential"}
_R5 = {
    "graph_heads": 1,
    "edge_weight": "exponential",
    "steps": 4,
    "topk": 8,
    "neighbor_block": 1,
    "window": 128,
    "self_edges": False,
    "stopping": "gated",
}

STEPS: Mapping[str, Step] = MappingProxyType(
    {
        step.name: step
        for step in (
            Step("R0", "stock GPT-2 attention", None),
            Step("R1", "RWR attention with its defaults", _R1),
            Step("R2", "R1 + reversible walk", _R2),
            Step("R3", "R2 with reciprocal beta 0.7 + discoverability", _R3),
            Step("R4", "R1 + exponential edges", _R4),
            Step("R5", "one induction graph, gated steps, every second layer", _R5, "every second"),
        )
    }
)


def step_options(step: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """The RWR options of a step's layers.

    Args:
        step: String, a key of `STEPS`.
        overrides: `None` or mapping of options that replace or add to the step's.

    Returns:
        A dict of options for `RWRGPT2Backbone`, or `None` for stock attention. Which layers walk
        depends on their number, see `Step.rwr_layers`.

    Raises:
        TypeError: If `step` is no string, or `overrides` no mapping.
        ValueError: If there is no such step, or R0 is given overrides.
    """
    check_choice("step", step, tuple(STEPS))
    options = STEPS[step].options
    overrides = {} if overrides is None else overrides
    if not isinstance(overrides, Mapping):
        raise TypeError(f"`overrides` must be a mapping. Received: overrides={overrides!r}")
    if options is not None:
        return {**options, **overrides}
    if overrides:
        raise ValueError(
            f"`overrides` must be empty for {step}, which has stock attention. "
            f"Received: overrides={dict(overrides)}"
        )
    return None


def build_backbone(step: str, overrides: Mapping[str, Any] | None = None, **arguments: Any) -> Any:
    """Builds the GPT-2 backbone of an ablation step.

    Args:
        step: String, a key of `STEPS`.
        overrides: `None` or mapping of RWR options that replace or add to the step's, `rwr_layers`
            among them.
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

    if "rwr_layers" not in options:
        options["rwr_layers"] = STEPS[step].rwr_layers(arguments["num_layers"])
    return RWRGPT2Backbone(**arguments, **options)
