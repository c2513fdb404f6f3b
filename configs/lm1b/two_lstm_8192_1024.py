"""2xLSTM-8192-1024: two LSTMs of 8192 units, projected to 1024.

Table 7: perplexity 34.7 after 10 epochs and 30.6 in the end, from Jozefowicz
et al. 2016: the best published before. The paper quotes these; common.py says
how the training here differs.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
  """2xLSTM-8192-1024."""
  return common["model"](
    ("lstm", "lstm"), width=1024, lstm={"hidden": 8192}, dropout=0.25
  )
