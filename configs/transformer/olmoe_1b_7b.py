"""OLMoE 1B-7B (2409.02060), from shapes: 8 of 64 experts.

Published: 6.92 B parameters, of which 1.28 B are active for a token.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
  """OLMoE 1B-7B."""
  return common["decoder"](
    vocab_size=50_304,
    width=2048,
    num_layers=16,
    attention={"kind": "multi_head", "num_heads": 16, "qk_norm": "width"},
    moe=common["experts"](64, 1024, {"kind": "softmax_top_k", "k": 8}),
    epsilon=1e-5,
    aux={"switch_balance": 1e-2, "z": 1e-3},
  )
