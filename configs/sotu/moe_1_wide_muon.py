"""MoE-1-Wide by Muon: the dense twin of moe_32_muon.py.

The same ops/timestep but for the router's 2,048, half of what it has with
noise; see moe_1_wide.py. Tuned with as many trials; the same rates were best.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """MoE-1-Wide of width 64."""
  path = pathlib.Path(__file__).with_name("moe_32_muon.py")
  return runpy.run_path(str(path))["get_config"]("moe_1_wide")
