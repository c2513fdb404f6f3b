"""DeepSeek-V2-Lite (2405.04434), from shapes: 6 of 64 experts, 2 shared.

Published: 15.7 B parameters, of which 2.4 B are active for a token.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
  """DeepSeek-V2-Lite."""
  moe = common["experts"](64, 1408, {"kind": "softmax_top_k", "k": 6})
  moe["shared"] = moe["experts"] | {"num_experts": 2}
  return common["decoder"](
    vocab_size=102_400,
    width=2048,
    num_layers=27,
    attention={
      "kind": "latent",
      "num_heads": 16,
      "rank": 512,
      "head_dim": 128,
      "rotary_dim": 64,
    },
    moe=moe,
    first={"kind": "feed_forward", "hidden": 10_944} | common["GATED"],
    aux={"switch_balance": 3e-3},
  )
