"""4xLSTM-512: two more LSTMs in place of the mixture.

Table 8: perplexity 47.0 after one epoch, 54.5 after a tenth.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
  """4xLSTM-512."""
  return common["four_lstm"]()
