"""What the recipes of this folder share: a Transformer of four blocks.

Embedding, four blocks 64 wide, softmax. Ops/timestep of the dense one:

  4 attentions        4 * 4 * 64 * 64    65,536
  4 feed-forwards     4 * 2 * 64 * 256  131,072

A sparse one has a mixture in every second block, whose k experts are together
as wide as the feed-forward layer that they replace: the same ops/timestep, but
for the routers' 2 * 64 * 32 = 4,096.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

WIDTH, HIDDEN, NUM_EXPERTS = 64, 256, 32


def get_config(
  router: Mapping[str, Any] | None = None, k: int = 1, **aux: float
) -> ConfigDict:
  """The recipe with a router, and weights of balance losses; or the dense one.

  Args:
    router: section of the mixtures' router; None makes a dense model.
    k: experts that a token visits.
    **aux: weights of losses.
  """
  model = {
    "kind": "transformer",
    "width": WIDTH,
    "num_samples": 512,
    "blocks": {
      "num_layers": 4,
      "attention": {"kind": "multi_head", "num_heads": 4},
      "pattern": ("dense",),
      "dense": {"kind": "feed_forward", "hidden": HIDDEN},
      "dropout": 0.1,
    },
  }
  if router is not None:
    model["blocks"] |= {
      "pattern": ("dense", "moe"),
      "moe": {
        "num_experts": NUM_EXPERTS,
        "router": {**router},
        "experts": {"kind": "feed_forward", "hidden": HIDDEN // k},
        "group_size": 512,
        "capacity_factor": 1.25,
        "eval_capacity_factor": 2.0,
        "dispatch": "gather",
      },
    }
  return ConfigDict(
    {
      "seed": 0,
      "layout": "expert",
      "data": {
        "kind": "sotu",  # or "text", with the files below
        "train": "",  # comma-separated text files
        "validation": "",  # carved out of train where none are given
        "test": "",
        "data_dir": "",  # where prepared corpora lie; "" is TFDS's own place
        "min_count": 3,
        "row_length": 64,
        "batch_size": 64,
      },
      "model": model,
      "aux": aux,
      "optimizer": {
        "kind": "adam",
        "peak": 1e-2,
        "warmup_steps": 200,
        "hold_steps": 0,
        "b1": 0.9,
        "b2": 0.98,
        "eps": 1e-8,
        "clip_norm": config_dict.placeholder(float),
      },
      "train": {
        "steps": 2400,
        "microbatches": 1,
        "balance_over": "microbatch",
        "log_every": 10,
        "eval_every": 400,
        "checkpoint_every": 200,
        "keep": 2,
      },
    }
  )
