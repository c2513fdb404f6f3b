"""English to German: 32 groups of 64 experts.

Table 3: perplexity 4.64 and BLEU 26.03 on newstest2014.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
  """MoE-2048-h."""
  return common["two_levels"](
    "en-de", steps=10_000, num_experts=2048, num_groups=32
  )
