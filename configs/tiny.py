"""A minute on two cores: the whole program, small.

moejax train --config=configs/tiny.py --workdir=runs/tiny
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
  """MoE-8 of width 32 on the presidents' messages."""
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
        "min_count": 5,
        "row_length": 32,
        "batch_size": 32,
      },
      "model": {
        "kind": "lstm_lm",
        "width": 32,
        "layers": ("lstm", "moe", "lstm"),
        "dropout": 0.1,
        "num_samples": 256,
        "dtype": "float32",  # of activations; or "bfloat16"
        "moe": {
          "num_experts": 8,
          "router": {"kind": "noisy_top_k", "k": 2},
          "experts": {"kind": "feed_forward", "hidden": 64},
          "group_size": 128,
          "capacity_factor": 1.25,
          "eval_capacity_factor": 2.0,
          "dispatch": "gather",
          "recompute": False,  # hidden layers of experts, in the backward pass
        },
      },
      "aux": {"importance": 0.1, "load": 0.1},
      "optimizer": {
        "kind": "adam",  # or "factored_adam", with less memory for experts
        "peak": 5e-3,
        "warmup_steps": 50,
        "hold_steps": 0,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "clip_norm": config_dict.placeholder(float),
      },
      "train": {
        "steps": 400,
        "microbatches": 1,
        "balance_over": "microbatch",
        "log_every": 10,
        "eval_every": 200,
        "checkpoint_every": 100,
        "keep": 2,
      },
    }
  )
