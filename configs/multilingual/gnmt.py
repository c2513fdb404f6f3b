"""GNMT-Multi: GNMT itself, many pairs of languages; the baseline of MoE-Multi.

moejax train --config=configs/multilingual/gnmt.py --workdir=runs/multi_gnmt \
  --config.data.train=en-fr=fr.tsv.xz,en-de=de.tsv.xz

Table 5: perplexity 4.14, and BLEU in twelve directions. The same on one pair
alone is its GNMT-Mono. Text and steps are those of moe_512.py, and as there
nothing is dropped out.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

_HERE = pathlib.Path(__file__)
wmt14 = runpy.run_path(str(_HERE.parents[1] / "wmt14" / "common.py"))
moe_512 = runpy.run_path(str(_HERE.with_name("moe_512.py")))


def get_config() -> ConfigDict:
  """GNMT."""
  mixture = moe_512["get_config"]()
  config = wmt14["gnmt"]("", steps=mixture.train.steps, dropout=0.0)
  with config.unlocked():
    config.data = mixture.data
  return config
