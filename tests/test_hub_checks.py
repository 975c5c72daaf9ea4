"""KerasHub's own checks of a backbone, a task and its preprocessor."""

import sys
import types

import pytest
from gpt2_models import JIT_COMPILE, LENGTH, ONE_LAYER, SMALL, make_batch

from keras_rwr.models import (
    RWRGPT2Backbone,
    RWRGPT2CausalLM,
    RWRGPT2CausalLMPreprocessor,
    RWRGPT2Tokenizer,
)

# KerasHub's module imports this package for checks of its data pipelines, which are not used here.
with pytest.MonkeyPatch.context() as patch:
    if "grain" not in sys.modules:
        patch.setitem(sys.modules, "grain", types.ModuleType("grain"))
    from keras_hub.src.tests import test_case

pytestmark = pytest.mark.costly

ARGUMENTS = {
    **ONE_LAYER,
    **SMALL,
    # KerasHub's checks trace and compile often: the fewest operations, and a weight of our own.
    "implementation": "reference",
    "steps": 0,
    "topk": 0,
    "use_discoverability": True,
}
VOCABULARY = ["!", "a", "b", "Ġ", "Ġa", "Ġb", "ab", "Ġab", "<|endoftext|>"]


def make_preprocessor():
    tokenizer = RWRGPT2Tokenizer(
        vocabulary={token: i for i, token in enumerate(VOCABULARY)},
        merges=["Ġ a", "Ġ b", "a b", "Ġa b"],
    )
    return RWRGPT2CausalLMPreprocessor(tokenizer, sequence_length=7)


# KerasHub's tasks do not save how they were compiled, and its checks use an old argument of Keras.
@pytest.mark.filterwarnings(
    "ignore:.*compile.*was not called as part of model loading",
    "ignore:The `check_types` argument is deprecated",
    "ignore:`shuffle=True` was passed, but will be ignored",
)
class TestHubChecks(test_case.TestCase):
    test_session = None  # a test of TensorFlow's that would count as skipped

    def test_backbone(self):
        self.run_backbone_test(
            cls=RWRGPT2Backbone,
            init_kwargs=ARGUMENTS,
            input_data=make_batch(),
            expected_output_shape=(3, LENGTH, 12),
            variable_length_data=[{name: x[:, :4] for name, x in make_batch().items()}],
        )

    def test_saving(self):
        backbone = RWRGPT2Backbone(**ARGUMENTS)
        for cls, arguments in (
            (RWRGPT2Backbone, ARGUMENTS),
            (RWRGPT2CausalLM, {"backbone": backbone, "preprocessor": None}),
        ):
            self.run_model_saving_test(cls, arguments, make_batch())

    def test_task(self):
        self.run_task_test(
            cls=RWRGPT2CausalLM,
            init_kwargs={
                "backbone": RWRGPT2Backbone(**ARGUMENTS),
                "preprocessor": make_preprocessor(),
            },
            train_data=(["a b ab", "b ab"],),
            expected_output_shape=(2, 7, ONE_LAYER["vocabulary_size"]),
            compile_kwargs={"jit_compile": JIT_COMPILE},
        )
