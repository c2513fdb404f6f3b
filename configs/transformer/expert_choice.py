"""Expert choice (2202.09368): experts choose 4 tokens in 32. Looks ahead."""

import pathlib
import runpy

from ml_collections import ConfigDict

common = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))


def get_config() -> ConfigDict:
  """A Transformer whose experts choose, in evaluation too."""
  router = {"kind": "expert_choice", "k": 4}
  config = common["get_config"](router, 4)
  # Perplexity tells nothing of the next word here: what experts choose depends
  # on all words of a group.
  config.model.looks_ahead = True
  return config
