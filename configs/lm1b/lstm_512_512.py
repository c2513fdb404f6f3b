"""LSTM-512-512: one LSTM of 512 units, projected to 512.

Table 7: perplexity 54.1 in the end, from Jozefowicz et al. 2016.
The paper quotes it; common.py says how the training here differs.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
  """LSTM-512-512."""
  return common["model"](("lstm",), lstm={"hidden": 512})
