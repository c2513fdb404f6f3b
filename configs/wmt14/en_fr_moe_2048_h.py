"""English to French: 32 groups of 64 experts.

Table 2: perplexity 2.69 and BLEU 40.35 on newstest2014; 2.63 and 40.56 after
twice the time.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
  """MoE-2048-h."""
  return common["two_levels"](
    "en-fr", steps=20_000, num_experts=2048, num_groups=32
  )
