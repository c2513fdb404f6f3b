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
test.

Result: the kinds divide the language by what a word needs: articles go to
identity experts, modal verbs to linear ones, conjunctions to narrow ones, and
to wide ones what carries the content, 40 % of the edges of rare words and 9 %
of those of the 100 most frequent. Test perplexity is 81.30, against 79.82 of
the uniform mixture and 82.15 of the dense twin. One seed, two cores of an Intel
Xeon (results/mixed_experts.csv).
"""

import numpy as np

from experiments import figures, harness, training
from moejax import config as config_lib
from moejax import losses

SEED = 0
KINDS = {
  "wide": {"kind": "feed_forward", "num_experts": 8, "hidden": 384},
  "narrow": {"kind": "feed_forward", "num_experts": 8, "hidden": 96},
  "linear": {"kind": "linear", "num_experts": 8},
  "identity": {"kind": "identity", "num_experts": 8},
}


def rows(quick: bool) -> figures.Rows:
  """Yields a row per model and kind of expert."""
  with training.folder("mixed_experts", quick) as runs:
    for model in ("mixed",) if quick else ("uniform", "mixed"):
      config = training.load("sotu/moe_32", {"seed": SEED})
      if quick:
        training.shrink(config, runs)
      # Multiply-adds of a row at an expert of each kind.
      width, moe = config.model.width, config.model.moe
      ops = {"all 32": 2 * width * moe.experts.hidden}
      if model == "mixed":
        moe.experts = tuple(KINDS.values())
        wide, narrow = KINDS["wide"]["hidden"], KINDS["narrow"]["hidden"]
        costs = (2 * width * wide, 2 * width * narrow, width**2, 0)
        ops = dict(zip(KINDS, costs, strict=True))
      run = training.train(config, runs / model)
      about = {
        "model": model,
        "test_perplexity": round(run.result["test"]["perplexity"], 2),
        "seconds": round(run.result["seconds"]),
      }
      for row in kinds(run, ops):
        yield about | row


def kinds(run: training.Run, ops: dict[str, int]) -> figures.Rows:
  """Yields what each kind of expert does with the test text."""
  data = config_lib.open_corpus(config_lib.parse(run.config), run.workdir)
  moe = run.config.model.moe
  gates = np.zeros(len(ops))
  # [words, kinds]: how many edges.
  edges = np.zeros((len(data.vocabulary), len(ops) + 1), np.int64)
  for batch, sown in training.decisions(run.workdir, "test"):
    (routing,) = losses.routings(sown)
    found = routing.assignment
    words = batch["inputs"].reshape(found.expert.shape[0], -1)
    word = np.tile(words, (1, found.expert.shape[1] // words.shape[1]))
    # The last column takes the unused edges.
    kind = found.expert // (moe.num_experts // len(ops))
    np.add.at(edges, (word, np.minimum(kind, len(ops))), 1)
    gates += [found.gate[kind == i].sum() for i in range(len(ops))]
  edges = edges[:, :-1]
  (tokens,) = data.tokens("train")
  seen = np.bincount(tokens.ids["target"], minlength=len(edges))
  common = np.argsort(-seen, kind="stable")[:100]
  total = edges.sum(axis=1)

  def parts(table):
    return table.sum(axis=tuple(range(table.ndim - 1))) / table.sum()

  share, frequent = parts(edges), parts(edges[common])
  gate, rare = parts(gates), parts(edges[seen < 100])
  for i, kind in enumerate(ops):
    # Few edges make no habit: 20 words of 4 edges.
    habit = np.where(total >= 80, edges[:, i] / np.maximum(total, 1), -1)
    words = np.argsort(-habit, kind="stable")[:8]
    yield {
      "kind": kind,
      **harness.rounded(share=share[i], gate=gate[i]),
      "ops": round(float(moe.router.k * ops[kind] * share[i])),
      **harness.rounded(frequent=frequent[i], rare=rare[i]),
      "words": " ".join(data.vocabulary.decode(words.tolist())),
    }


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  mixed = [row for row in table if row["model"] == "mixed"]
  meanings = {
    "share": "all words",
    "gate": "all, sum of gates",
    "frequent": "100 commonest words",
    "rare": "rare words",
  }
  for axes, column in figures.panels(figure, 2.8, meanings, sharey=True):
    parts = {column: [100 * row[column] for row in mixed]}
    names = [row["kind"] for row in mixed]
    figures.bars(axes, names, parts, figures.OTHERS, "{:.0f} %".format)
    axes.set_xlim(0, 52)
    axes.set_xlabel("% of edges" if column != "gate" else "% of the sum")
  wide = mixed[0]
  return (
    f"Wide experts take {100 * wide['rare']:.0f} % of the edges of rare words"
    f" and {100 * wide['frequent']:.0f} % of those of frequent ones"
  )


if __name__ == "__main__":
  harness.main("mixed_experts", rows, draw, SEED)
