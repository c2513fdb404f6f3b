"""131,072 linear experts: the largest model of the paper's earlier draft.

34 billion parameters, perplexity 29.9 there. That each expert is a matrix of
512 x 512 is what the draft says; that there are 256 groups of 512 is as in the
largest model of Table 8. The schedule is the draft's.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
  """131,072 linear experts."""
  config = common["two_levels"](num_experts=131_072, num_groups=256)
  del config.model.hierarchical_moe.secondary["experts"]
  config.model.hierarchical_moe.secondary.experts = {"kind": "linear"}
  # An expert gets 9 tokens of a batch in the mean; of a microbatch, 2.
  config.train.microbatches = 1
  config.optimizer.warmup_steps = 200
  config.optimizer.hold_steps = 200
  return config
