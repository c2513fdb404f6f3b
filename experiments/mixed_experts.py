"""Question: who gets which words where experts are of different architecture?

Method: configs/sotu/moe_32.py against the same model whose 32 experts are 8
wide (hidden 384), 8 narrow (hidden 96), 8 linear and 8 identity ones: the same
ops/timestep while every expert is as busy as the next, which the balance losses
ask for: (2 * 64 * (384 + 96) + 64 * 64) / 4 = 2 * 64 * 128. The same steps on
the same batches. Then every word of the test text goes through the best
checkpoint: `share` is a kind's part of all edges, `gate` its part of their
weight, `ops` what its edges cost a word; `frequent` is its part of the edges of
the 100 most frequent words, `rare` of those seen fewer than 100 times in
training; `words` are those it gets most above its share, of at least 20 in the
test. Runs lie under runs/mixed_experts and are resumed there.

Result: the kinds divide the language by what a word needs. Identity experts get
articles and possessives (<S>, the, a, its, his), linear ones the modal verbs
(should, could, will), narrow ones conjunctions (And, But, because, whether),
and wide ones what carries the content (programs, forces, receipts,
expenditures): 40 % of the edges of rare words and 9 % of those of the 100 most
frequent, where a quarter would be even (another third of the rare words is
passed through as it is). Nothing asks for that but the task:
the balance losses keep every kind at a quarter of all edges (0.245 to 0.256).
As a language model it stands between: test perplexity 81.30, against 79.82 of
the uniform mixture and 82.15 of the dense twin (results/sparse_against_dense;
ops/timestep 66,744 and 65,536 outside the LSTMs and the router). One seed, two
cores of an Intel Xeon, other work beside (results/mixed_experts.csv).
"""

import collections
import pathlib
from collections.abc import Iterator
from typing import Any

import matplotlib.figure
import numpy as np

from experiments import figures, harness, training
from moejax import config as config_lib
from moejax import losses
from moejax import workdir as workdir_lib
from moejax.data import corpora

SEED = 0
KINDS = (
  {"kind": "feed_forward", "num_experts": 8, "hidden": 384},
  {"kind": "feed_forward", "num_experts": 8, "hidden": 96},
  {"kind": "linear", "num_experts": 8},
  {"kind": "identity", "num_experts": 8},
)
QUICK = training.QUICK | {"train.eval_every": 10}
NAMES = ("wide", "narrow", "linear", "identity")


def rows(quick: bool) -> Iterator[harness.Row]:
  """Yields a row per model and kind of expert."""
  with training.folder("mixed_experts", quick) as runs:
    for name in ("uniform", "mixed"):
      config = training.load("sotu/moe_32")
      config.seed = SEED
      if quick:
        config.update_from_flattened_dict(QUICK)
      if name == "mixed":
        del config.model.moe["experts"]
        with config.unlocked():
          config.model.moe.experts = KINDS
      run = training.train(config, runs / name)
      yield from report(name, runs / name, run.result)


def report(
  name: str, workdir: pathlib.Path, result: dict[str, Any]
) -> Iterator[harness.Row]:
  """Yields what each kind of expert of a run gets."""
  config = workdir_lib.recall(workdir)
  data = config_lib.data(config, workdir)
  visits, gates = visits_of(config, data, workdir)
  width = config.model.width
  cost = kind_costs(width, name, config)
  kinds = NAMES if name == "mixed" else ("all 32",)
  counts = visits.sum(axis=0)
  ids = np.arange(visits.shape[0])
  (tokens,) = data.tokens("train")
  seen = np.bincount(tokens.ids["target"], minlength=ids.size)
  order = np.argsort(-seen, kind="stable")
  frequent = visits[order[:100]].sum(axis=0)
  rare = visits[seen < 100].sum(axis=0)
  for i, kind in enumerate(kinds):
    yield {
      "model": name,
      "test_perplexity": round(result["test"]["perplexity"], 2),
      "seconds": round(result["seconds"]),
      "kind": kind,
      "share": round(float(counts[i] / counts.sum()), 3),
      "gate": round(float(gates[i] / gates.sum()), 3),
      "ops": round(
        float(config.model.moe.router.k * cost[i] * counts[i] / counts.sum())
      ),
      "frequent": round(float(frequent[i] / frequent.sum()), 3),
      "rare": round(float(rare[i] / rare.sum()), 3),
      "words": " ".join(typical(visits, i, data)),
    }


def kind_costs(
  width: int, name: str, config: config_lib.Config
) -> tuple[int, ...]:
  """Multiply-adds of one row at an expert of each kind."""
  if name == "uniform":
    return (2 * width * config.model.moe.experts.hidden,)
  wide, narrow = KINDS[0]["hidden"], KINDS[1]["hidden"]
  return (2 * width * wide, 2 * width * narrow, width * width, 0)


def typical(visits: np.ndarray, kind: int, data: corpora.Corpus) -> list[str]:
  """Returns the words that a kind gets most above its share."""
  total = visits.sum(axis=1)
  share = visits[:, kind] / np.maximum(total, 1)
  # Few edges make no habit: 20 words of 4 edges.
  order = np.argsort(-np.where(total >= 80, share, -1), kind="stable")
  return data.vocabulary.decode(order[:8].tolist())


def visits_of(
  config: config_lib.Config, data: corpora.Corpus, workdir: pathlib.Path
) -> tuple[np.ndarray, np.ndarray]:
  """Counts the edges of each word to each kind, and sums each kind's gates."""
  num_kinds = 1 if hasattr(config.model.moe.experts, "kind") else len(KINDS)
  per_kind = config.model.moe.num_experts // num_kinds
  visits = np.zeros((len(data.vocabulary), num_kinds + 1), np.int64)
  gates: collections.Counter[int] = collections.Counter()

  for batch, sown in training.decisions(workdir, "test"):
    (routing,) = losses.routings(sown)
    found = routing.assignment
    groups = found.expert.shape[0]
    words = batch["inputs"].reshape(groups, -1)
    choices = found.expert.shape[1] // words.shape[1]
    word = np.tile(words, (1, choices))
    kind = np.minimum(found.expert // per_kind, num_kinds)
    np.add.at(visits, (word, kind), 1)
    for i in range(num_kinds):
      gates[i] += float(found.gate[kind == i].sum())
  return visits[:, :num_kinds], np.array([gates[i] for i in range(num_kinds)])


def draw(figure: matplotlib.figure.Figure, table: list[harness.Row]) -> str:
  """Draws each kind's part of all, of frequent and of rare words."""
  figure.set_size_inches(8, 2.8)
  mixed = [row for row in table if row["model"] == "mixed"]
  panels = {
    "share": "all words",
    "gate": "all, sum of gates",
    "frequent": "100 commonest words",
    "rare": "rare words",
  }
  for axes, (column, meaning) in zip(
    figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True
  ):
    parts = {column: [100 * row[column] for row in mixed]}
    names = [row["kind"] for row in mixed]
    figures.bars(axes, names, parts, figures.OTHERS, "{:.0f} %".format)
    axes.set_title(meaning)
    axes.set_xlim(0, 52)
    axes.set_xlabel("% of edges" if column != "gate" else "% of the sum")
  wide = mixed[0]
  return (
    f"Wide experts take {100 * wide['rare']:.0f} % of the edges of rare words"
    f" and {100 * wide['frequent']:.0f} % of those of frequent ones"
  )


if __name__ == "__main__":
  harness.main("mixed_experts", rows, draw, SEED)
