"""MoE-256-h: 16 groups of 16 experts.

Table 7: perplexity 36.0 after 10 epochs.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
  """MoE-256-h."""
  return common["two_levels"](num_experts=256, num_groups=16)
