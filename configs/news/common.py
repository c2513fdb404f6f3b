"""What the rows of Table 8 share: the paper's 100 billion words (app. D).

That corpus of Google News is not public. The configs read the One Billion Word
benchmark in its place, by the reader of configs/lm1b, with the 100,000 most
frequent words: the paper gives no vocabulary, but its totals leave 75,000 to
110,000. For the rest the models are those of configs/lm1b/common.py, with
batches of about 2.5 million words: 19,456 rows of 128, in 128 groups of tokens,
so that microbatches times devices may be up to 128: here 4 and 32, or for the
two largest mixtures 2 and 64, and 1 and 128, the paper's devices.

Mixtures drop no token but those two. Without drops each device would set memory
aside for the rows of 64 or 128 devices (moejax/ragged.py), 10 GB at the door of
the 131,072 experts and several times that within. They have slots for a quarter
more than the mean of each level, in evaluation for twice the mean. Their
secondary mixtures route together what all groups of a microbatch sent (sec.
3.1): of one group an expert gets less than a token in the mean, and has at
least 4 slots. So the 131,072 experts are sent 76 tokens each, and have 119
slots. A layout with n data replicas of the experts wants `groups_together` an
n-th of that.

The tables of words are small enough to lie whole on every device: split, sums
of all words of a batch would travel (`moejax plan` shows 5 GB, four times).

The paper's memory (app. D): an expert's hidden units are computed again in the
backward pass, and the optimizer holds no first moment of experts and a factored
second one.

No dropout: no word comes twice in the paper's run of one epoch, for which
`steps` is. `passes` keeps to that: of a smaller text, as the benchmark is, one
pass ends the training, after some 330 steps of its 829 million words. Any text
of one's own is read in its place by

  --config.data.kind=text --config.data.train='news/*.txt.gz'

with the words that it has `min_count` times or more.

The balance losses are over the whole batch, as in configs/lm1b; where there is
one microbatch that costs nothing.
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
  num_experts: int,
  num_groups: int,
  microbatches: int = 4,
  groups_together: int = 1,
) -> ConfigDict:
  """Returns LSTM, MoE, LSTM with 2 experts of each of 2 groups a token.

  With groups of tokens together experts have slots.
  """
  config = lm1b["two_levels"](num_experts, num_groups)
  config.train.microbatches = microbatches
  layer = config.model.hierarchical_moe
  layer.groups_together = groups_together
  layer.secondary.recompute = True
  if groups_together > 1:
    for level in (layer, layer.secondary):
      level.capacity_factor, level.eval_capacity_factor = 1.25, 2.0
  return _as_news(config, config.model.hierarchical_moe)


def _as_news(config: ConfigDict, *mixtures: Any) -> ConfigDict:
  with config.ignore_type():
    config.layout = "expert"
  config.data.vocab_size = 100_000
  config.data.batch_size = BATCH_SIZE
  config.model.dropout = 0.0
  config.optimizer.kind = "factored_adam"
  config.train.steps = 40_000
  config.train.passes = 1
  for mixture in mixtures:
    mixture.group_size = BATCH_SIZE * config.data.row_length // GROUPS
  return config
