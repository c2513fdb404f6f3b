"""English to German: 16 groups of 32 experts."""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
  """MoE-512-h."""
  return common["two_levels"](
    "en-de", steps=10_000, num_experts=512, num_groups=16
  )
