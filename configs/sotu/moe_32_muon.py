"""MoE-32 by Muon, without noise or sigmoid: what `make train` runs.

What moe_32.py has of the paper, but for what makes experts pay on so little
text: an optimizer whose steps do not shrink with what an expert has seen, gates
without noise, and no sigmoid behind the mixture. Rates are the best of eight
trials (experiments/tuned_alike.py). In place of the noise it is Switch's loss
that brings back an expert without a token: its gradient reaches every logit.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config(name: str = "moe_32") -> ConfigDict:
  """MoE-32 of width 64, or another config of this folder."""
  path = pathlib.Path(__file__).with_name(f"{name}.py")
  config = runpy.run_path(str(path))["get_config"]()
  config.model.sigmoid = False
  config.optimizer.update({"kind": "muon", "peak": 2e-2, "scale": 0.1})
  if "moe" in config.model:
    config.model.moe.router.kind = "top_k"
    config.aux = {"importance": 0.1, "switch_balance": 1e-2}
  return config
