"""English to French: no mixture.

Fig. 4 shows its curve.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
  """LSTMs alone."""
  return common["no_mixture"]("en-fr", steps=20_000)
