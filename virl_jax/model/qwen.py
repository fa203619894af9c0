"""The old place of `model.qwen2_5.model`, for scripts that import it from here."""

from virl_jax.model.qwen2_5 import model

Config, specs = model.Config, model.specs
hf_inputs, logits_from_hf_inputs = model.hf_inputs, model.logits_from_hf_inputs
