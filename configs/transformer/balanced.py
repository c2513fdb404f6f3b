"""Strictly balanced gating (app. F) in a Transformer: 4 of 32 experts."""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
  """A Transformer whose experts choose in training."""
  router = {"kind": "balanced", "k": 4}
  return common["get_config"](router, 4, threshold=1.0)
