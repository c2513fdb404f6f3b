"""Strict settings for every test: 8 devices, no promotion, no warnings."""

import os

# Before jax is imported: it counts its devices once.
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jaxtyping

# Shapes of every public function are checked while the tests run.
hook = jaxtyping.install_import_hook("moejax", "beartype.beartype")

import hypothesis
import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Compiling makes first examples slow; that is no failure.
hypothesis.settings.register_profile(
  "moejax", deadline=None, max_examples=20, derandomize=True
)
hypothesis.settings.load_profile("moejax")
