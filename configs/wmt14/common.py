"""What the rows of Tables 2 and 3 share: WMT'14 (sec. 5.3, app. E).

moejax train --config=configs/wmt14/en_fr_moe_32.py --workdir=runs/en_fr \
  --config.data.data_dir=...

Each model is a file here that calls one of these functions, and runs this file
by its path: a config is read by a program that need not know the folder. The
scores they name are the paper's; none was measured here. The paper validates by
newstest2012 and 2013; TFDS prepares the former by itself, as the message says
that asks for it, and `--config.data.validation=newstest2013` does without.

The models differ in their mixtures alone: none, 32 experts of which 4 read a
token, or two levels of 2 of 16 groups and 2 of their 32 experts, or 2 of 32 and
2 of 64. Gating is strictly balanced (app. F). The balance losses are those that
it has: the load is equal by itself, so only importance is asked for, and the
thresholds of inference are learned.

Experts take their share of all tokens of a microbatch, as eq. 18 has it of the
batch (one microbatch, `--config.train.microbatches=1`, is the whole), and of
two levels groups of experts do; experts within them take theirs of all that
their group of experts got. The thresholds (eq. 20) and importance are over all
microbatches, for which the forward pass runs twice.

What the paper does not say is chosen as follows.

A batch is the paper's largest, 64 devices of about 16,000 words: 8192 rows of
128 pieces of the target, beside as many of the source, packed with whole pairs.
It has 64 groups of tokens on either side, so that microbatches times devices
may be up to 64: here 4 and 16. One device of little memory wants 64
microbatches, and then groups_together=1.

No token is dropped in training unless a group of 16,384 tokens, a random sample
of rows, has more than half again the mean share of an expert, or of a group of
experts; `dropped_fraction` tells. In evaluation a token may visit twice as many
experts as in the mean, at either level; rows are sorted, and none is dropped.

Attention is GNMT's recurrent wiring, of 512 units. The paper gives the time of
training, not its steps: these are what its devices may have done in that time.
The peak of the learning rate and the constants of Adam are the usual ones, to
be tuned.
"""

from typing import Any

from ml_collections import ConfigDict, config_dict

ROW_LENGTH = 128
BATCH_SIZE = 8192
GROUPS = 64
MICROBATCHES = 4
BALANCED = {"importance": 0.01, "threshold": 1.0}
OVER_BATCH = {"over": "batch", "group_factor": 1.5}


def model(pair: str, steps: int, mixture: str, **fields: Any) -> ConfigDict:
  """Returns the config of a model.

  Args:
    pair: source and target, as "en-fr".
    steps: of training.
    mixture: name of the layer between the LSTMs; "" has none.
    **fields: of the model, its section of the mixture among them.
  """
  between = (mixture,) if mixture else ()
  return ConfigDict(
    {
      "seed": 0,
      "layout": "expert",
      "data": {
        "kind": "wmt14",
        "pair": pair,
        "data_dir": "",  # where it was prepared; "" is TFDS's own place
        "validation": ("newstest2012", "newstest2013"),
        "vocab_size": 32_768,
        "row_length": ROW_LENGTH,
        "source_length": ROW_LENGTH,
        "batch_size": BATCH_SIZE,
      },
      "model": {
        "kind": "gnmt",
        "width": 512,
        "encoder": ("lstm", "lstm", *between, "lstm"),
        "decoder": ("lstm", *between, "lstm"),
        "lstm": {"hidden": 2048},
        "attention": {
          "width": 512,
          "form": "product",  # or "sum", GNMT's
          "wiring": "recurrent",  # or "every_layer", "parallel"
        },
        "dropout": 0.4,
        "dtype": "float32",  # of activations; or "bfloat16"
        **fields,
      },
      "aux": BALANCED if mixture else {},
      "optimizer": {
        "kind": "adam",
        "peak": 1e-3,
        "warmup_steps": 2000,
        "hold_steps": 8000,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "clip_norm": config_dict.placeholder(float),
      },
      "train": {
        "steps": steps,
        "microbatches": MICROBATCHES,
        "balance_over": "batch" if mixture else "microbatch",
        "log_every": 10,
        "eval_every": 1000,
        "checkpoint_every": 500,
        "keep": 2,
      },
    }
  )


def no_mixture(pair: str, steps: int) -> ConfigDict:
  """Returns LSTMs alone."""
  return model(pair, steps, "")


def gnmt(pair: str, steps: int, dropout: float) -> ConfigDict:
  """Returns the paper's baseline, GNMT itself (1609.08144).

  Its layers and its attention are GNMT's, and so are dropout and the norm at
  which gradients are cut. What it is trained by is the same as of the others,
  Adam all the way, where GNMT goes on with plain gradient descent: they read
  the same text in the same steps.
  """
  config = model(
    pair,
    steps,
    "",
    width=1024,
    encoder=("bidirectional_lstm", *("lstm",) * 7),
    decoder=("lstm",) * 8,
    lstm={"hidden": config_dict.placeholder(int)},  # no projection
    attention={"width": 1024, "form": "sum", "wiring": "every_layer"},
    residual_from=3,
    dropout=dropout,
  )
  config.optimizer.clip_norm = 5.0
  return config


def flat(pair: str, steps: int, num_experts: int) -> ConfigDict:
  """Returns mixtures of `num_experts` experts, 4 a token."""
  return model(
    pair,
    steps,
    "moe",
    moe={
      "num_experts": num_experts,
      "router": {"kind": "balanced", "k": 4, **OVER_BATCH},
      "experts": {"kind": "feed_forward", "hidden": 2048},
      "group_size": BATCH_SIZE * ROW_LENGTH // GROUPS,
      "capacity_factor": config_dict.placeholder(float),
      "eval_capacity_factor": config_dict.placeholder(float),
      "recompute": False,
    },
  )


def two_levels(
  pair: str, steps: int, num_experts: int, num_groups: int
) -> ConfigDict:
  """Returns mixtures of 2 experts of each of 2 groups a token."""
  return model(
    pair,
    steps,
    "hierarchical_moe",
    hierarchical_moe={
      "num_experts": num_experts,
      "num_groups": num_groups,
      "group_size": BATCH_SIZE * ROW_LENGTH // GROUPS,
      "groups_together": GROUPS // MICROBATCHES,
      "capacity_factor": 1.0,
      "eval_capacity_factor": config_dict.placeholder(float),
      "primary": {"kind": "balanced", "k": 2, **OVER_BATCH},
      "secondary": {
        "router": {"kind": "balanced", "k": 2},
        "experts": {"kind": "feed_forward", "hidden": 2048},
        # Of the slots that arrive two in three are taken.
        "capacity_factor": 1 / OVER_BATCH["group_factor"],
        "eval_capacity_factor": config_dict.placeholder(float),
        "recompute": False,
      },
    },
  )
