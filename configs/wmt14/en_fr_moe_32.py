"""English to French: 4 of 32 experts a token.

Fig. 4 shows its curve.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
  """MoE-32."""
  return common["flat"]("en-fr", steps=20_000, num_experts=32)
