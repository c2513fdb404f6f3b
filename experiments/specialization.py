"""Question: what do the experts of a translator specialize in (Table 9)?

Method: a finished run, that of translation_capacity with 32 experts or another
--workdir, of which the encoder's first mixture is looked at, or the first of a
language model; of two levels the experts of all groups, whose gates are the
product of both. The test text goes through its best checkpoint, each distinct
sentence once. `context` is where an expert has its largest gates, the piece
between **. `bits` are how much an expert's pieces differ from everyone's:
KL(p(piece | expert) || p(piece)), counted over edges; `shuffled` is the same by
luck, after the pieces have changed places at random, mean of ten times.
Contexts are of the six experts of most bits above that, among those with half
the mean `load` or more. The row `piece` is the mean over edges: the information
that the choice of an expert carries about the piece. `previous` is what it
carries about the piece before, where the piece itself is known; only places of
the same piece change there. `most` is what could be: the entropy of the choice,
less that among the experts of one place.

Result: of translation_capacity's English to French (32 experts, 4 a token) the
choice of an expert carries 2.22 bits about the piece, of 2.99 that it could, by
luck 0.46; and 0.58 about the piece before, by luck 0.39. Every expert does, by
1.62 to 3.02 bits (results/specialization.csv).
"""

import itertools
import pathlib
import tempfile

import numpy as np

from experiments import figures, harness, training, translating
from moejax import files as files_lib
from moejax import workdir as workdir_lib
from moejax.analysis import measures, trace
from moejax.data.pieces import Pieces

SEED = 0
CONTEXTS = 10
WORKDIR = "a finished run in place of translation_capacity's"


def rows(quick: bool, workdir: str = "") -> figures.Rows:
  """Yields what the experts know, and contexts of the most special ones."""
  if workdir:
    yield from known(files_lib.path(workdir))
  elif quick:
    # Of two levels, as the paper's.
    for _, _, run in translating.trained(["moe_512_h"], quick):
      yield from known(run.workdir)
  else:
    runs = training.ROOT / "runs" / "translation_capacity"
    yield from known(runs / "en-fr_moe_32")


def known(workdir: files_lib.Path) -> figures.Rows:
  """Yields the rows of a run."""
  decisions = read(workdir)
  vocabulary = workdir_lib.vocabulary(Pieces, workdir)
  every = list(knowledge(decisions))
  yield from every
  busy = [row for row in every if row.get("load", 0) >= 0.5]
  busy.sort(key=lambda row: row["shuffled"] - row["bits"])
  contexts = measures.contexts(decisions, CONTEXTS, vocabulary.decode)
  for row in busy[:6]:
    for rank, (gate, *around) in enumerate(contexts[row["expert"]], start=1):
      left, piece, right = around
      context = f"{left}**{piece.strip()}**{right}".strip()
      ranked = {"rank": rank, "gate": round(gate, 4), "context": context}
      yield row | {"about": "context"} | ranked


def read(workdir: files_lib.Path) -> measures.Decisions:
  """Returns what is decided about the distinct sentences of a test text."""
  with tempfile.TemporaryDirectory() as folder:
    to = pathlib.Path(folder) / "trace"
    layers = trace.record(workdir, to)["layers"]
    encoder = [name for name in layers if trace.side(name) == "source"]
    decisions = trace.decisions(to, (encoder or list(layers))[0])
  seen, distinct = set(), np.zeros(decisions.ids.size, bool)
  starts = np.flatnonzero(decisions.position == 0)
  for first, last in itertools.pairwise([*starts, decisions.ids.size]):
    sentence = decisions.ids[first:last].tobytes()
    distinct[first:last] = sentence not in seen
    seen.add(sentence)
  return decisions.of(distinct)


def knowledge(decisions: measures.Decisions) -> figures.Rows:
  """Yields what the choice of an expert tells, and what each expert does."""
  rng = np.random.default_rng(SEED)
  ids = decisions.ids
  # 0 at the first, where nothing is before.
  before = np.where(decisions.position == 0, 0, np.roll(ids, 1) + 1)
  piece = measures.knowledge(decisions, ids, rng)
  yield {"about": "piece"} | harness.rounded(**piece.total)
  previous = measures.knowledge(decisions, before, rng, given=ids).total
  del previous["most"]
  yield {"about": "previous"} | harness.rounded(**previous)
  for expert, share in enumerate(piece.share):
    bits, luck = piece.bits[expert], piece.shuffled[expert]
    row = {"bits": bits, "shuffled": luck, "load": share * piece.share.size}
    yield {"about": "expert", **harness.rounded(**row), "expert": expert}


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  axes = figure.subplots()
  experts = [row for row in table if row["about"] == "expert"]
  load, bits, luck = (
    [row[column] for row in experts] for column in ("load", "bits", "shuffled")
  )
  axes.plot(load, bits, "o", color=figures.SPARSE)
  axes.plot(load, luck, "x", color=figures.GRAY)
  for row in table:
    if row.get("rank") == 1:
      at = (row["load"], row["bits"])
      figures.label(axes, f"expert {row['expert']}", at, figures.SPARSE)
  figures.label(axes, "by chance", (load[0], luck[0]), figures.GRAY)
  figures.scales(
    axes,
    "load of the expert / mean load",
    "bits that an expert's word pieces carry",
  )
  axes.margins(x=0.12)
  axes.set_ylim(bottom=0)
  return (
    f"Every expert has its own word pieces: {figures.span(bits, '{:.1f}')}"
    f" bits, by chance {figures.span(luck, '{:.1f}')}"
  )


if __name__ == "__main__":
  harness.main("specialization", rows, draw, SEED, workdir=WORKDIR)
