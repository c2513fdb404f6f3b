"""The dense twin of the recipes of this folder, at the same ops/timestep."""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
  """A dense Transformer."""
  return common["get_config"]()
