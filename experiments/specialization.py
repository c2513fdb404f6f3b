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

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.special

from experiments import figures, harness, training, translating
from moejax import files as files_lib
from moejax import losses
from moejax import workdir as workdir_lib
from moejax.data import packing
from moejax.data.pieces import Pieces

SEED = 0
CONTEXTS = 10
WORDS = 4  # of a context, on either side
WORKDIR = "a finished run in place of translation_capacity's"


class Places(NamedTuple):
  """The word pieces of a text, sentence after sentence.

  Attributes:
    ids: of each.
    begin: the number of the piece that its sentence begins with.
    gates: of every expert, 0 where it does not read the piece.
  """

  ids: np.ndarray
  begin: np.ndarray
  gates: np.ndarray


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
  """Yields the rows of a run, and prints the contexts."""
  places = read(workdir)
  vocabulary = workdir_lib.vocabulary(Pieces, workdir)
  every = list(knowledge(places))
  yield from every
  busy = [row for row in every if row.get("load", 0) >= 0.5]
  busy.sort(key=lambda row: row["shuffled"] - row["bits"])
  for row in busy[:6]:
    found = contexts(places, row["expert"], vocabulary)
    for rank, (gate, context) in enumerate(found, start=1):
      ranked = {"rank": rank, "gate": round(gate, 4), "context": context}
      yield row | {"about": "context"} | ranked


def read(workdir: files_lib.Path) -> Places:
  """Routes the distinct sentences of a run's test text."""
  seen, parts, size = set(), [], 0
  for batch, sown in training.decisions(workdir, "test"):
    text, start, side = "inputs", "start", ""
    if "source" in batch:
      text, start, side = "source", "source_start", "encoder"
    mixtures = {name: sown[name] for name in sown if name.startswith(side)}
    routing = losses.routings(mixtures)[0]
    gates = training.gates(routing)
    mask = (routing.primary or routing).mask
    ids, real = batch[text].reshape(-1), np.reshape(mask, -1)
    starts = np.flatnonzero(batch[start])
    for first, last in zip(starts, [*starts[1:], ids.size], strict=True):
      sentence = ids[first:last]
      if real[first] and sentence.tobytes() not in seen:
        seen.add(sentence.tobytes())
        begin = np.full(sentence.size, size)
        parts.append(Places(sentence, begin, gates[first:last]))
        size += sentence.size
  return Places(*map(np.concatenate, zip(*parts, strict=True)))


def knowledge(places: Places) -> figures.Rows:
  """Yields what the choice of an expert tells, and what each expert does."""
  rng = np.random.default_rng(SEED)
  ids, gates = places.ids.astype(np.int64), places.gates
  # 0 at the first, where nothing is before.
  first = np.arange(ids.size) == places.begin
  before = np.where(first, 0, np.roll(ids, 1) + 1)
  apart = ids * (ids.max() + 2)

  def among_same():
    mixed = apart.copy()
    order = np.lexsort((rng.random(ids.size), ids))
    mixed[np.argsort(ids, kind="stable")] += before[order]
    return mixed

  def by_luck(shuffle):
    return np.mean([information(shuffle(), gates)[1] for _ in range(10)], 0)

  share, bits = information(ids, gates)
  luck = by_luck(lambda: rng.permutation(ids))
  choices = np.count_nonzero(gates, axis=1)
  own = scipy.special.xlogy(choices, choices).sum() / choices.sum()
  most = (scipy.special.entr(share).sum() - own) / np.log(2)
  yield {"about": "piece"} | harness.rounded(
    bits=share @ bits, shuffled=share @ luck, most=most
  )
  _, both = information(apart + before, gates)
  by_chance = share @ (by_luck(among_same) - bits)
  yield {"about": "previous"} | harness.rounded(
    bits=share @ (both - bits), shuffled=by_chance
  )
  for expert, load in enumerate(share * share.size):
    row = {"bits": bits[expert], "shuffled": luck[expert], "load": load}
    yield {"about": "expert", **harness.rounded(**row), "expert": expert}


def information(
  labels: np.ndarray, gates: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns each expert's part of all edges, and the bits of its labels."""
  place, expert = np.nonzero(gates)
  names, number = np.unique(labels, return_inverse=True)
  joint = np.zeros((names.size, gates.shape[1]))
  np.add.at(joint, (number[place], expert), 1 / place.size)
  share = joint.sum(axis=0)
  apart = joint.sum(axis=1, keepdims=True) * share[None]
  bits = scipy.special.rel_entr(joint, apart).sum(axis=0) / np.log(2)
  return share, np.divide(bits, share, out=bits, where=share > 0)


def contexts(
  places: Places, expert: int, vocabulary: packing.Tokenizer
) -> Iterator[tuple[float, str]]:
  """Yields the largest gates of an expert, and where, no context twice."""

  def spell(ids):
    spelled = vocabulary.decode(ids.tolist())
    return spelled if isinstance(spelled, str) else " ".join(spelled)

  seen, gates = set(), places.gates[:, expert]
  for place in np.argsort(-gates, kind="stable"):
    if gates[place] == 0 or len(seen) == CONTEXTS:
      return
    begin = places.begin[place]
    end = np.searchsorted(places.begin, begin, side="right")
    before, upto, whole = (
      spell(places.ids[begin:last]) for last in (place, place + 1, end)
    )
    piece = upto[len(before) :] or (" </s>" if place + 1 == end else " <tag>")
    left = " ".join(before.split(" ")[-WORDS:])
    right = " ".join(whole[len(upto) :].split(" ")[: WORDS + 1])
    space = " " * piece.startswith(" ")
    context = f"{left}{space}**{piece.strip()}**{right}".strip()
    if context not in seen:
      seen.add(context)
      yield float(gates[place]), context


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
