"""Balance without a loss (2408.15664), a shared expert: as in DeepSeek-V3."""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
  """A Transformer with 3 of 32 experts, and one for every token."""
  router = {"kind": "sigmoid", "k": 3}
  return common["get_config"](router, 4, shared=1, bias=1.0)
