"""Switch-Base (2101.03961), from shapes: 1 of 128 experts in T5's base model.

Published: 7 B parameters, at the operations of T5-Base, of 0.2 B.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
  """Switch-Base with 128 experts."""
  return common["encoder_decoder"](
    vocab_size=32_128,
    width=768,
    num_layers=12,
    attention={"kind": "multi_head", "num_heads": 12},
    hidden=3072,
    moe=common["experts"](128, 3072, {"kind": "switch"}, False, 1.25),
    batch_size=2048,
    position="relative",
    tied=True,
  )
