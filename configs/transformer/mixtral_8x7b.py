"""Mixtral 8x7B (2401.04088), from shapes: 2 of 8 experts.

Published: 46.7 B parameters, of which 12.9 B are active for a token.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
  """Mixtral 8x7B."""
  return common["decoder"](
    vocab_size=32_000,
    width=4096,
    num_layers=32,
    attention={
      "kind": "multi_head",
      "num_heads": 32,
      "num_kv_heads": 8,
      "rotary_base": 1e6,
    },
    moe=common["experts"](8, 14_336, {"kind": "top_k", "k": 2}),
    epsilon=1e-5,
    # The hidden units of an expert lie over all that 8 experts leave.
    layout={"name": "eight_experts", "mesh_shape": (1, 8, -1)},
  )
