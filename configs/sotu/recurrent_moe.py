"""A recurrent mixture on the presidents' messages (sec. 3.1).

The paper proposes it and has no model of it. In moe_32.py an LSTM whose
matrices are a mixture takes the place of the mixture, with as many ops/timestep
and parameters: 2 of 16 experts, each of (64 + 64) * 4 * 64 = 32,768, and a
router of 2 * 128 * 16 = 4,096. Everything else is that file's.
"""

import pathlib
import runpy

from ml_collections import ConfigDict, config_dict

moe_32 = runpy.run_path(str(pathlib.Path(__file__).with_name("moe_32.py")))


def get_config() -> ConfigDict:
  """A recurrent mixture of width 64."""
  config = moe_32["get_config"]()
  del config.model["moe"]
  config.model.layers = ("lstm", "recurrent_moe", "lstm")
  config.model.recurrent_moe = {
    "num_experts": 16,
    "router": {"kind": "noisy_top_k", "k": 2},
    "group_size": 8,  # rows, of which a time step has 64
    "capacity_factor": config_dict.placeholder(float),
    "eval_capacity_factor": config_dict.placeholder(float),
    "dispatch": "auto",
    "segment": 8,  # time steps that the backward pass runs again at once
  }
  return config
