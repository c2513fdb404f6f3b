"""Minutes on two cores: English to French by a Transformer with mixtures.

python -m experiments.package_pairs
moejax train --config=transformer/translate_tiny --workdir=runs/translate_moe
echo "Unable to retrieve the user." |
  moejax translate --workdir=runs/translate_moe

In the second block of each side 2 of 16 experts, together as wide as the dense
layer of the first. The dense twin has that in both:

moejax train --config=transformer/translate_tiny \\
  --workdir=runs/translate_dense \\
  --config.model.encoder.pattern=dense, --config.model.decoder.pattern=dense,
"""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
  """Two blocks 128 wide in the encoder and in the decoder."""
  moe = {
    "num_experts": 16,
    "router": {"kind": "noisy_top_k", "k": 2},
    "experts": {"kind": "feed_forward", "hidden": 128},
    "group_size": 256,
    "capacity_factor": 1.5,
    "eval_capacity_factor": 2.0,
    "dispatch": "gather",
  }
  side = {
    "num_layers": 2,
    "attention": {"kind": "multi_head", "num_heads": 4},
    "pattern": ("dense", "moe"),
    "dense": {"kind": "feed_forward", "hidden": 256},
    "moe": moe,
    "dropout": 0.1,
  }
  data = {
    "kind": "pairs",
    "train": "en-fr=runs/en_fr.tsv",
    "validation": "",  # carved out of train where none are given
    "test": "",
    "data_dir": "",  # where prepared corpora lie; "" is TFDS's own place
    "vocab_size": 4000,
    "row_length": 64,
    "source_length": 64,
    "batch_size": 32,
  }
  model = {
    "kind": "pair_transformer",
    "width": 128,
    "tied": True,
    "encoder": side,
    "decoder": {**side, "moe": {**moe}},
  }
  optimizer = {"peak": 3e-3, "warmup_steps": 400, "b2": 0.98, "clip_norm": 5.0}
  train = {"steps": 1600, "eval_every": 400, "checkpoint_every": 200}
  aux = {"importance": 0.01, "load": 0.01}
  return common["assemble"](data, model, aux, optimizer, train)
