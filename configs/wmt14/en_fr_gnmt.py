"""English to French: GNMT itself, the baseline.

Table 2: perplexity 2.79 and BLEU 39.22 on newstest2014.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
  """GNMT."""
  return common["gnmt"]("en-fr", steps=20_000, dropout=0.2)
