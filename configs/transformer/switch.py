"""Switch (2101.03961): 1 of 32 experts, each as wide as a dense layer."""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
  """A Transformer with Switch layers."""
  return common["get_config"]({"kind": "switch"}, switch_balance=1e-2)
