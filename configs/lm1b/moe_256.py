"""MoE-256: 4 of 256 experts a token.

Table 7: perplexity 35.7 after 10 epochs; Table 6 varies its losses.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
  """MoE-256."""
  return common["flat"](num_experts=256)
