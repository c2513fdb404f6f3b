"""What the recipes of this folder share: a Transformer of four blocks.

Embedding, four blocks 64 wide, softmax. Ops/timestep of the dense one:

  4 attentions        4 * 4 * 64 * 64    65,536
  4 feed-forwards     4 * 2 * 64 * 256  131,072

A sparse one has a mixture in every second block, whose k experts are together
as wide as the feed-forward layer that they replace: the same ops/timestep, but
for the routers' 2 * 64 * 32 = 4,096, twice that with noise.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

WIDTH, HIDDEN, NUM_EXPERTS = 64, 256, 32


def get_config(
  router: Mapping[str, Any] | None = None,
  k: int = 1,
  shared: int = 0,
  **aux: float,
) -> ConfigDict:
  """The recipe with a router, and weights of balance losses; or the dense one.

  Args:
    router: section of the mixtures' router; None makes a dense model.
    k: experts that a token visits.
    shared: how many of these are the same for every token.
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
      "dropout": 0.0,
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
  if shared:
    moe = model["blocks"]["moe"]
    moe["shared"] = moe["experts"] | {"num_experts": shared}
  data = {
    "kind": "sotu",  # or "text", with the files below
    "train": "",  # comma-separated text files
    "validation": "",  # carved out of train where none are given
    "test": "",
    "data_dir": "",  # where prepared corpora lie; "" is TFDS's own place
    "min_count": 3,
    "row_length": 64,
    "batch_size": 64,
  }
  optimizer = {"peak": 1e-2, "warmup_steps": 200, "b2": 0.98}
  train = {"steps": 2400, "eval_every": 400, "checkpoint_every": 200}
  return assemble(data, model, aux, optimizer, train)


def assemble(data, model, aux, optimizer, train, layout="expert"):
  return ConfigDict(
    {
      "seed": 0,
      "layout": layout,
      "data": data,
      "model": model,
      "aux": aux,
      "optimizer": {
        "kind": "adam",
        "hold_steps": 0,
        "b1": 0.9,
        "eps": 1e-8,
        "clip_norm": config_dict.placeholder(float),
        **optimizer,
      },
      "train": {
        "microbatches": 1,
        "balance_over": "microbatch",
        "log_every": 10,
        "keep": 2,
        **train,
      },
    }
  )


# -- published models ---------------------------------------------------------

GATED = {"activation": "silu", "gated": True}
# In bfloat16, every repeated block one program, which is run again in the
# backward pass; none of them was trained here.
_LARGE = {"scan": True, "recompute": True}
_OPTIMIZER = {"peak": 4e-4, "warmup_steps": 2000, "b2": 0.95, "clip_norm": 1.0}
_TRAIN = {"steps": 100_000, "eval_every": 1000, "checkpoint_every": 1000}


def experts(
  num_experts: int,
  hidden: int,
  router: Mapping[str, Any],
  gated: bool = True,
  capacity_factor: float | None = None,
) -> dict[str, Any]:
  """The section of a mixture; without a capacity factor it drops nothing."""
  kind = {"kind": "feed_forward", "hidden": hidden}
  factor = capacity_factor or config_dict.placeholder(float)
  return {
    "num_experts": num_experts,
    "router": router,
    "experts": kind | (GATED if gated else {}),
    "group_size": 512,
    "capacity_factor": factor,
    "eval_capacity_factor": factor,
    "dispatch": "auto",
  }


def decoder(
  *,
  vocab_size: int,
  width: int,
  aux: Mapping[str, float] = {"switch_balance": 1e-2},
  first: Mapping[str, Any] | None = None,
  layout: Any = "expert",
  **blocks: Any,
) -> ConfigDict:
  """A language model whose every block has experts, but a `first` dense one.

  Memory is set aside for all rows that could come to a device's experts, which
  grows with a microbatch and not with the number of devices.
  """
  dense = {} if first is None else {"first": ("dense",), "dense": first}
  data = {
    "kind": "text",
    "tokens": {"kind": "pieces", "vocab_size": vocab_size},
    "train": "",  # comma-separated text files
    "validation": "",
    "test": "",
    "data_dir": "",
    "row_length": 4096,
    "batch_size": 1024,
  }
  model = {
    "kind": "transformer",
    "width": width,
    "dtype": "bfloat16",
    "blocks": {"pattern": ("moe",), **blocks, **dense, **_LARGE},
  }
  train = _TRAIN | {"microbatches": 32}
  return assemble(data, model, aux, _OPTIMIZER, train, layout)


def encoder_decoder(
  *,
  vocab_size: int,
  width: int,
  hidden: int,
  batch_size: int,
  tied: bool = False,
  **blocks: Any,
) -> ConfigDict:
  """A model of pairs with experts in every second block."""
  dense = {"kind": "feed_forward", "hidden": hidden}
  side = {"pattern": ("dense", "moe"), "dense": dense, **blocks, **_LARGE}
  data = {
    "kind": "wmt14",
    "pair": "en-de",
    "data_dir": "",
    "vocab_size": vocab_size,
    "row_length": 512,
    "source_length": 512,
    "batch_size": batch_size,
  }
  model = {
    "kind": "pair_transformer",
    "width": width,
    "dtype": "bfloat16",
    "tied": tied,
    "encoder": side,
    "decoder": {**side},
  }
  aux = {"switch_balance": 1e-2}
  optimizer = _OPTIMIZER | {"kind": "factored_adam"}
  return assemble(data, model, aux, optimizer, _TRAIN | {"microbatches": 4})
