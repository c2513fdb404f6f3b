"""English to German: GNMT itself, the baseline.

Table 3: perplexity 5.25 and BLEU 24.91 on newstest2014.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
  """GNMT."""
  return common["gnmt"]("en-de", steps=10_000, dropout=0.3)
