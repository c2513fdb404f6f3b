"""Minutes on two cores: English to French, out of packages.

python -m experiments.package_pairs
moejax train --config=configs/translate_tiny.py --workdir=runs/translate
echo "Unable to retrieve the user." | moejax translate --workdir=runs/translate
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """MoE-16 of width 128, in the encoder and in the decoder."""
  return ConfigDict(
    {
      "seed": 0,
      "layout": "expert",
      "data": {
        "kind": "pairs",
        "train": "en-fr=runs/en_fr.tsv",  # files of languages, with commas
        "validation": "",  # carved out of train where none are given
        "test": "",
        "data_dir": "",  # where prepared corpora lie; "" is TFDS's own place
        "vocab_size": 4000,
        "row_length": 64,
        "source_length": 64,
        "batch_size": 32,
        "both_directions": False,
        "temperature": 1.0,  # above 1, small languages are read more often
        "strict": False,  # refuse lines that are no pair
      },
      "model": {
        "kind": "gnmt",
        "width": 128,
        "encoder": ("lstm", "lstm", "moe", "lstm"),
        "decoder": ("lstm", "moe", "lstm"),
        "attention": {
          "width": 128,
          "form": "product",  # or "sum", GNMT's
          "wiring": "recurrent",  # or "every_layer", "parallel"
        },
        "dropout": 0.2,
        "dtype": "float32",  # of activations; or "bfloat16"
        "moe": {
          "num_experts": 16,
          "router": {"kind": "noisy_top_k", "k": 2},
          "experts": {"kind": "feed_forward", "hidden": 256},
          "group_size": 256,
          "capacity_factor": 1.5,
          "eval_capacity_factor": 2.0,
          "dispatch": "gather",
          "recompute": False,  # hidden layers of experts, in the backward pass
        },
      },
      "aux": {"importance": 0.01, "load": 0.01},
      "optimizer": {
        "kind": "adam",  # or "factored_adam", with less memory for experts
        "peak": 3e-3,
        "warmup_steps": 200,
        "hold_steps": 600,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "clip_norm": 5.0,
      },
      "train": {
        "steps": 1600,
        "microbatches": 1,
        "balance_over": "microbatch",
        "log_every": 20,
        "eval_every": 400,
        "checkpoint_every": 200,
        "keep": 2,
      },
    }
  )
