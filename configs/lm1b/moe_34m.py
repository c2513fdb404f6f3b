"""MoE-34M: 32 groups of 32 experts of 2048 units, width 1024.

Table 7: perplexity 31.3 after 10 epochs, the medium budget of Table 1.
The paper does not say how many groups; 32 are what its counts come from.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
  """MoE-34M."""
  return common["two_levels"](
    num_experts=1024, num_groups=32, hidden=2048, width=1024, dropout=0.3
  )
