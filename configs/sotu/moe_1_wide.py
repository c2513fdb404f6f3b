"""MoE-1-Wide on the presidents' messages: the dense twin of MoE-32.

One expert as wide as the 4 active ones of moe_32.py together, always on: the
same ops/timestep (2 * 64 * 512 = 65,536) but for the router's 4,096.
Everything else is that file's.
"""

import importlib.util
import pathlib

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """MoE-1-Wide of width 64."""
  # A config is read from its path, by a program that need not know this folder.
  path = pathlib.Path(__file__).with_name("moe_32.py")
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  del config.model["moe"]
  config.model.layers = ("lstm", "one_expert", "lstm")
  config.model.one_expert = {"kind": "feed_forward", "hidden": 512}
  return config
