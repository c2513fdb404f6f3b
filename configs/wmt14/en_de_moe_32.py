"""English to German: 4 of 32 experts a token."""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
  """MoE-32."""
  return common["flat"]("en-de", steps=10_000, num_experts=32)
