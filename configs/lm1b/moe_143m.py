"""MoE-143M: 32 groups of 8 experts of 8192 units, large LSTMs.

Table 7: perplexity 28.0 after 10 epochs, the high budget of Table 1.
As for groups, see moe_34m.py.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
  """MoE-143M."""
  return common["two_levels"](
    num_experts=256,
    num_groups=32,
    hidden=8192,
    width=1024,
    lstm={"hidden": 4096},
    dropout=0.4,
  )
