"""MoE-1024-h: 16 groups of 64 experts.

Table 7: perplexity 34.6 after 10 epochs.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
  """MoE-1024-h."""
  return common["two_levels"](num_experts=1024, num_groups=16, dropout=0.2)
