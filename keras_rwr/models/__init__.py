"""KerasHub models with RWR attention. This needs `keras-hub`; importing keras_rwr does not."""

from keras_rwr.models.gpt2_backbone import RWRGPT2Backbone
from keras_rwr.models.gpt2_causal_lm import RWRGPT2CausalLM

__all__ = ["RWRGPT2Backbone", "RWRGPT2CausalLM"]
