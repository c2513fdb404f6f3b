"""MoE-4096-h: 16 groups of 256 experts.

Table 7: perplexity 34.1 after 10 epochs, the low budget of Table 1.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
  """MoE-4096-h."""
  return common["two_levels"](num_experts=4096, num_groups=16, dropout=0.2)
