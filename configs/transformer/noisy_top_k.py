"""The paper's gate in a Transformer: noisy top-k, 4 of 32 experts."""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
  """A Transformer with the paper's mixtures."""
  router = {"kind": "noisy_top_k", "k": 4}
  return common["get_config"](router, 4, importance=0.1, load=0.1)
