"""LSTM-2048-512: one LSTM of 2048 units, projected to 512.

Table 7: perplexity 44.7 after 10 epochs. That of Jozefowicz et al. 2016,
the same model, had 45.0, and 43.7 in the end.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
  """LSTM-2048-512."""
  return common["model"](("lstm",), lstm={"hidden": 2048})
