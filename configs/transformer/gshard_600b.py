"""GShard's largest (2006.16668), from shapes: 2 of 2048 experts, 36 layers.

Published: 600 B parameters; 18 layers in the encoder and in the decoder, of
which every other has experts.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
  """GShard with 2048 experts in 36 layers."""
  # Groups so large that an expert of 2048 has 4 slots in each.
  moe = common["experts"](2048, 8192, {"kind": "gshard_top_2"}, False, 1.0)
  moe["group_size"] = 4096
  return common["encoder_decoder"](
    vocab_size=64_000,
    width=1024,
    num_layers=18,
    attention={"kind": "multi_head", "num_heads": 16, "head_dim": 128},
    hidden=8192,
    moe=moe,
    batch_size=8192,
    norm="layer",
  )
