"""GShard (2006.16668): 2 of 32 experts, the second by chance in training."""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
  """A Transformer with GShard's layers."""
  router = {"kind": "gshard_top_2"}
  return common["get_config"](router, 2, switch_balance=1e-2)
