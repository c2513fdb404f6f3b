"""What the rows of Table 8 share: the paper's 100 billion words (app. D).

That corpus of Google News is not public. The configs read the One Billion Word
benchmark in its place, by the reader of configs/lm1b, with the 100,000 most
frequent words: the paper gives no vocabulary, but its totals leave 75,000 to
110,000. For the rest the models are those of configs/lm1b/common.py, with
batches of about 2.5 million words: 19,456 rows of 128, in 128 groups of tokens,
so that microbatches times devices may be up to 128: here 4 and 32, or for the
two largest mixtures 2 and 64, and 1 and 128, the paper's devices. As there, all
groups of a microbatch are together at the second level; the 131,072 experts are
sent 76 tokens each in the mean, and have 119 slots.

The paper's memory (app. D): an expert's hidden units are computed again in the
backward pass, and the optimiser holds no first moment of experts and a factored
second one. No dropout: no word comes twice in the paper's run of one epoch, for
which `steps` is.
"""

import pathlib
import runpy
from typing import Any

from ml_collections import ConfigDict

_FOLDER = pathlib.Path(__file__).parents[1]
lm1b = runpy.run_path(str(_FOLDER / "lm1b" / "common.py"))

BATCH_SIZE = 19_456
GROUPS = 128


def four_lstm() -> ConfigDict:
  """Returns four LSTMs."""
  return _as_news(lm1b["model"](("lstm",) * 4))


def flat(num_experts: int) -> ConfigDict:
  """Returns LSTM, MoE, LSTM with 4 of `num_experts` experts a token."""
  config = lm1b["flat"](num_experts)
  config.model.moe.recompute = True
  return _as_news(config, config.model.moe)


def two_levels(
  num_experts: int, num_groups: int, microbatches: int = 4
) -> ConfigDict:
  """Returns LSTM, MoE, LSTM with 2 experts of each of 2 groups a token."""
  config = lm1b["two_levels"](num_experts, num_groups)
  config.train.microbatches = microbatches
  config.model.hierarchical_moe.groups_together = GROUPS // microbatches
  config.model.hierarchical_moe.secondary.recompute = True
  return _as_news(config, config.model.hierarchical_moe)


def _as_news(config: ConfigDict, *mixtures: Any) -> ConfigDict:
  config.data.vocab_size = 100_000
  config.data.batch_size = BATCH_SIZE
  config.model.dropout = 0.0
  config.optimizer.kind = "factored_adam"
  config.train.steps = 40_000
  for mixture in mixtures:
    mixture.group_size = BATCH_SIZE * config.data.row_length // GROUPS
  return config
