"""MoE-32 on the presidents' messages, as the paper trains it.

The paper's MoE-32 (Table 7) at an eighth of its width: embedding, LSTM, 32
experts of which 4 are active, LSTM, softmax, all 64 wide. Ops/timestep:

  2 LSTMs         2 * 4 * (64 + 64) * 64   65,536
  4 experts       4 * 2 * 64 * 128         65,536
  router          2 * 64 * 32               4,096
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
  """MoE-32 of width 64."""
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
      "model": {
        "kind": "lstm_lm",
        "width": 64,
        "layers": ("lstm", "moe", "lstm"),
        "dropout": 0.1,
        "num_samples": 512,
        "moe": {
          "num_experts": 32,
          "router": {"kind": "noisy_top_k", "k": 4},
          "experts": {"kind": "feed_forward", "hidden": 128},
          "group_size": 512,
          "capacity_factor": 1.25,
          "eval_capacity_factor": 2.0,
          "dispatch": "gather",
        },
      },
      "aux": {"importance": 0.1, "load": 0.1},
      "optimizer": {
        "kind": "adam",
        "peak": 2e-2,
        "warmup_steps": 100,
        "hold_steps": 0,
        "b1": 0.9,
        "b2": 0.999,
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
