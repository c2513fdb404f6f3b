"""What the rows of Table 7 share: the One Billion Word benchmark (app. C).

moejax train --config=configs/lm1b/moe_32.py --workdir=runs/lm1b \
  --config.data.data_dir=... --config.data.vocab_file=...

Each row is a file here that calls one of these functions, and runs this file by
its path: a config is read by a program that need not know the folder. The
perplexities they name are the paper's; none was measured here.

The rows LSTM-512-512, LSTM-1024-512 and 2xLSTM-8192-1024 the paper quotes from
Jozefowicz et al. 2016. Here they train by the recipe of the mixtures: Adam with
a schedule, 10 epochs, batches of 300,000 words of whole sentences, the state
zero at each, residual layers. In theirs (by their code) Adagrad at a rate of
0.2, to convergence, batches of 128 rows of 20 words of a running text, the
state carried on, LSTM gradients clipped at 10 and their weights averaged; the
samples of the softmax, 8192, are the same. So their perplexities are no target
of these configs. LSTM-2048-512 the paper has both quoted and trained itself.

What the paper does not say is chosen as follows.

A batch is about 300,000 words: 2304 rows of 128, packed with sentences so that
hardly a place is left over. It has 64 groups of tokens, so that microbatches
times devices may be up to 64: here 4 and 16. One device of little memory wants
64 microbatches.

Mixtures drop no token, as in the paper, those of two levels included. For that
a device sets memory aside for as many rows as could come to it, those of all
devices that share the experts (moejax/ragged.py): with many devices a
capacity_factor at both levels, as 1.25, takes less of it and drops 1 to 2 %.

The balance losses are those of the whole batch, not the mean of its
microbatches': that runs the forward pass twice, about a third more of a step's
products, and keeps the routing of every microbatch, and costs nothing where
there is one alone (`--config.train.microbatches=1`). The mean is to be had by
`--config.train.balance_over=microbatch`.

The paper gives no peak of the learning rate, no constants of Adam and no number
of samples; these are the usual ones, to be tuned.
"""

from typing import Any

from ml_collections import ConfigDict, config_dict

ROW_LENGTH = 128
BATCH_SIZE = 2304
GROUPS = 64


def model(layers: tuple[str, ...], **fields: Any) -> ConfigDict:
  """Returns the config of a model, width 512 and dropout 0.1 if not given."""
  return ConfigDict(
    {
      "seed": 0,
      # As "expert", and the tables of words split as the experts are.
      "layout": {
        "name": "expert_vocab",
        "mesh_shape": (1, -1, 1),
        "rules": {"vocab": "expert"},
      },
      "data": {
        "kind": "lm1b",
        "data_dir": "",  # where it was prepared; "" is TFDS's own place
        "vocab_file": "",  # one word a line, most frequent first
        "vocab_size": 793_471,
        "test": "",  # news.en.heldout-00000-of-00050; "" is what TFDS holds out
        "row_length": ROW_LENGTH,
        "batch_size": BATCH_SIZE,
      },
      "model": {
        "kind": "lstm_lm",
        "width": 512,
        "layers": layers,
        "dropout": 0.1,
        "dtype": "float32",  # of activations; or "bfloat16"
        "num_samples": 8192,
        "vocab_multiple": 128,  # devices that may share the tables
        **fields,
      },
      "aux": {"importance": 0.1, "load": 0.1},
      "optimizer": {
        "kind": "adam",
        "peak": 1e-3,
        "warmup_steps": 1000,
        "hold_steps": 0,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "clip_norm": config_dict.placeholder(float),
      },
      "train": {
        "steps": 27_000,  # 10 epochs
        "passes": config_dict.placeholder(int),
        "microbatches": 4,
        "balance_over": "microbatch",
        "log_every": 10,
        "eval_every": 1000,
        "checkpoint_every": 500,
        "keep": 2,
      },
    }
  )


def one_expert(hidden: int | tuple[int, ...]) -> ConfigDict:
  """Returns LSTM, a single expert, LSTM."""
  return model(
    ("lstm", "one_expert", "lstm"),
    one_expert={"kind": "feed_forward", "hidden": hidden},
  )


def _balanced(layers: tuple[str, ...], **fields: Any) -> ConfigDict:
  """Returns the config of a model that has balance to lose."""
  config = model(layers, **fields)
  config.train.balance_over = "batch"
  return config


def flat(num_experts: int) -> ConfigDict:
  """Returns LSTM, MoE, LSTM with 4 of `num_experts` experts a token."""
  return _balanced(
    ("lstm", "moe", "lstm"),
    moe={
      "num_experts": num_experts,
      "router": {"kind": "noisy_top_k", "k": 4},
      "experts": {"kind": "feed_forward", "hidden": 1024},
      "group_size": BATCH_SIZE * ROW_LENGTH // GROUPS,
      "capacity_factor": config_dict.placeholder(float),
      "eval_capacity_factor": config_dict.placeholder(float),
      "recompute": False,
    },
  )


def two_levels(
  num_experts: int, num_groups: int, hidden: int = 1024, **fields: Any
) -> ConfigDict:
  """Returns LSTM, MoE, LSTM with 2 experts of each of 2 groups a token."""
  return _balanced(
    ("lstm", "hierarchical_moe", "lstm"),
    hierarchical_moe={
      "num_experts": num_experts,
      "num_groups": num_groups,
      "group_size": BATCH_SIZE * ROW_LENGTH // GROUPS,
      "groups_together": 1,
      "capacity_factor": config_dict.placeholder(float),
      "eval_capacity_factor": config_dict.placeholder(float),
      "primary": {"kind": "noisy_top_k", "k": 2},
      "secondary": {
        "router": {"kind": "noisy_top_k", "k": 2},
        "experts": {"kind": "feed_forward", "hidden": hidden},
        "capacity_factor": config_dict.placeholder(float),
        "eval_capacity_factor": config_dict.placeholder(float),
        "recompute": False,
      },
    },
    **fields,
  )
