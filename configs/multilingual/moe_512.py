"""MoE-Multi: 2 of 512 experts of 8192 units a token, many pairs of languages.

moejax train --config=configs/multilingual/moe_512.py --workdir=runs/multi \
  --config.data.train=en-fr=fr.tsv.xz,en-de=de.tsv.xz

Table 5: perplexity 3.35, and BLEU in twelve directions, of which data the paper
says only that they are those of Johnson et al. 2016, and not public. Any files
of pairs will do; small ones are read more often than their share.

The model is that of configs/wmt14/common.py, but for its mixtures: flat, with
noisy top-k gating (eq. 3-5), and no dropout, which the paper has for single
pairs. The balance losses are over the whole batch, of all microbatches, which
runs the forward pass twice. The steps are those in which three billion pairs
are read, at 32 pieces a pair.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

_FOLDER = pathlib.Path(__file__).parents[1]
wmt14 = runpy.run_path(str(_FOLDER / "wmt14" / "common.py"))


def get_config() -> ConfigDict:
  """MoE-512."""
  config = wmt14["flat"]("", steps=90_000, num_experts=512)
  lengths = {
    name: config.data[name]
    for name in ("vocab_size", "row_length", "source_length", "batch_size")
  }
  with config.unlocked():
    config.data = {
      "kind": "pairs",
      "train": "",  # en-fr=a.tsv.xz,en-de=b.tsv
      "validation": "",  # carved out of train where none are given
      "test": "",
      "both_directions": True,
      "temperature": 2.0,  # 1 reads every pair as often as any other
      "strict": False,  # refuse lines that are no pair
      **lengths,
    }
    config.model.moe.router = {"kind": "noisy_top_k", "k": 2}
    config.aux = {"importance": 0.01, "load": 0.01}
  config.model.moe.experts.hidden = 8192
  config.model.dropout = 0.0
  return config
