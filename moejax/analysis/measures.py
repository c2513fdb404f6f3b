"""What a mixture's decisions about a text tell, in numbers: NumPy alone."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import scipy.special
from jaxtyping import Bool, Float, Int


class Decisions(NamedTuple):
  """What a mixture decided about a text, its tokens in order.

  Attributes:
    num_experts: E.
    ids: of the tokens, in the vocabulary.
    position: of each token in its sentence, from 0.
    margin: how far, in logits, the chosen experts are ahead of the others; NaN
      where there is none.
    token: where each edge starts, from 0; those of a token follow each other.
    expert: where it leads.
    gate: its gate.
    dropped: whether the expert was full.
    choice: which choice of its token it is, from 0.
  """

  num_experts: int
  ids: Int[np.ndarray, "N"]
  position: Int[np.ndarray, "N"]
  margin: Float[np.ndarray, "N"]
  token: Int[np.ndarray, "A"]
  expert: Int[np.ndarray, "A"]
  gate: Float[np.ndarray, "A"]
  dropped: Bool[np.ndarray, "A"]
  choice: Int[np.ndarray, "A"]

  def per_expert(self, values: Any = None) -> Float[np.ndarray, "E"]:
    """Sums a value of the edges, or their number, over those of an expert."""
    return np.bincount(self.expert, values, self.num_experts).astype(float)

  def of(self, tokens: Bool[np.ndarray, "N"]) -> "Decisions":
    """Returns those about some of the tokens."""
    number, edges = np.cumsum(tokens) - 1, tokens[self.token]
    text = {n: getattr(self, n)[tokens] for n in ("ids", "position", "margin")}
    rest = ("expert", "gate", "dropped", "choice")
    about = {name: getattr(self, name)[edges] for name in rest}
    return self._replace(token=number[self.token[edges]], **text, **about)


def balance(load: Float[np.ndarray, "E"]) -> dict[str, float]:
  """Returns how even a load is: CV and max/mean (sec. 4), bits of entropy.

  Of a load of nothing all are 0; `unused` counts the experts without any.
  """
  mean = max(load.mean(), 1e-10)
  share = load / max(load.sum(), 1e-10)
  return {
    "cv": load.std() / mean,
    "max_over_mean": load.max() / mean,
    "entropy": scipy.special.entr(share).sum() / np.log(2),
    "unused": int((load == 0).sum()),
  }


# -- what an expert knows -----------------------------------------------------


class Knowledge(NamedTuple):
  """What the choice of an expert tells about a label of the token.

  Attributes:
    share: of all edges that lead to each expert.
    bits: KL(p(label | expert) || p(label)) of each expert; `share @ bits` is
      the mutual information.
    shuffled: the same by luck, where labels have changed places at random.
    most: bits that the choices could tell at most: their entropy, less that
      among the experts of one token.
  """

  share: Float[np.ndarray, "E"]
  bits: Float[np.ndarray, "E"]
  shuffled: Float[np.ndarray, "E"]
  most: float

  @property
  def total(self) -> dict[str, float]:
    """The mean over edges, in bits."""
    bits, shuffled = self.share @ self.bits, self.share @ self.shuffled
    return {"bits": bits, "shuffled": shuffled, "most": self.most}


def knowledge(
  decisions: Decisions,
  labels: Int[np.ndarray, "N"],
  rng: np.random.Generator,
  given: Int[np.ndarray, "N"] | None = None,
  times: int = 10,
) -> Knowledge:
  """Returns what experts tell about labels of tokens.

  Where another label is `given`, it is what they tell beyond that one; only
  tokens of the same one then change places, so many times.
  """
  E = decisions.num_experts
  if given is None:
    known, apart = np.zeros(E), np.zeros_like(labels, np.int64)
  else:
    apart = given.astype(np.int64) * (labels.max(initial=0) + 1)
    known = information(decisions, given)

  def mixed():
    if given is None:
      return rng.permutation(labels)
    order = np.lexsort((rng.random(labels.size), given))
    found = apart.copy()
    found[np.argsort(given, kind="stable")] += labels[order]
    return found

  by_luck = [information(decisions, mixed()) for _ in range(times)]
  share = decisions.per_expert() / max(decisions.expert.size, 1)
  choices = np.bincount(decisions.token)
  own = scipy.special.xlogy(choices, choices).sum() / max(choices.sum(), 1)
  return Knowledge(
    share,
    information(decisions, apart + labels) - known,
    np.mean(by_luck, axis=0) - known,
    (scipy.special.entr(share).sum() - own) / np.log(2),
  )


def information(
  decisions: Decisions, labels: Int[np.ndarray, "N"]
) -> Float[np.ndarray, "E"]:
  """Returns the bits of each expert's labels: KL(p(label | e) || p(label)).

  Both are counted over edges.
  """
  E, A = decisions.num_experts, max(decisions.expert.size, 1)
  label, expert, count = occurrences(decisions, labels)
  share = decisions.per_expert() / A
  of_label = np.bincount(label, count) / A
  joint = count / A
  bits = joint * np.log2(joint / (of_label[label] * share[expert]))
  found = np.bincount(expert, bits, E)
  return np.divide(found, share, out=np.zeros(E), where=share > 0)


def occurrences(
  decisions: Decisions, labels: Int[np.ndarray, "N"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Counts which labels an expert gets: numbers of labels, experts, edges.

  Labels are numbered in their order, from 0.
  """
  E = decisions.num_experts
  _, number = np.unique(labels, return_inverse=True)
  keys = number[decisions.token].astype(np.int64) * E + decisions.expert
  keys, count = np.unique(keys, return_counts=True)
  return keys // E, keys % E, count


def preferred(
  decisions: Decisions, labels: Int[np.ndarray, "N"], number: int
) -> list[list[tuple[int, int, float]]]:
  """Returns the labels that tell each expert apart, the most telling first.

  A label is (label, edges, lift): how many times as often it is among the
  expert's edges as among all. Told by is its part of the expert's bits; what is
  not more frequent than among all is left out.
  """
  A = max(decisions.expert.size, 1)
  label, expert, count = occurrences(decisions, labels)
  names = np.unique(labels)
  own = decisions.per_expert()
  lift = count * A / (np.bincount(label, count)[label] * own[expert])
  order = np.lexsort((-count * np.log(lift), expert))
  begin = np.searchsorted(expert[order], np.arange(decisions.num_experts + 1))
  found = []
  for first, last in zip(begin[:-1], begin[1:], strict=True):
    best = order[first : min(last, first + number)]
    found.append(
      [
        (int(names[label[i]]), int(count[i]), float(lift[i]))
        for i in best
        if lift[i] > 1
      ]
    )
  return found


def contexts(
  decisions: Decisions,
  number: int,
  decode: Callable[[list[int]], str],
  words: int = 4,
) -> list[list[tuple[float, str, str, str]]]:
  """Returns where each expert's gates are largest, no context twice (Table 9).

  A context is the gate, the words before, the token and the words after it.
  """
  found: list[list[tuple[float, str, str, str]]]
  found = [[] for _ in range(decisions.num_experts)]
  starts = np.flatnonzero(decisions.position == 0)
  order = np.lexsort((-decisions.gate, decisions.expert))
  begin = np.searchsorted(
    decisions.expert[order], np.arange(decisions.num_experts + 1)
  )
  for expert, own in enumerate(found):
    seen = set()
    for edge in order[begin[expert] : begin[expert + 1]]:
      if decisions.gate[edge] == 0 or len(own) == number:
        break
      at = decisions.token[edge]
      after = np.searchsorted(starts, at, side="right")
      end = starts[after] if after < starts.size else decisions.ids.size
      context = _around(
        decisions.ids, starts[after - 1], at, end, decode, words
      )
      if context not in seen:
        seen.add(context)
        own.append((float(decisions.gate[edge]), *context))
  return found


def _around(ids, begin, at, end, decode, words):
  """Returns the words before a token, what it adds to them, and those after."""
  before, upto, whole = (
    decode(ids[begin:last].tolist()) for last in (at, at + 1, end)
  )
  piece = upto[len(before) :] or (" </s>" if at + 1 == end else " <tag>")
  left = " ".join(before.split(" ")[-words:])
  right = " ".join(whole[len(upto) :].split(" ")[: words + 1])
  # Where a word begins, the space is before it.
  if piece.startswith(" "):
    left, piece = f"{left} ", piece[1:]
  return left, piece, right


# -- experts beside each other ------------------------------------------------


def together(
  decisions: Decisions, tokens: int
) -> Iterator[tuple[int, int, int, float]]:
  """Yields pairs of experts that read a token both: (a, b, tokens, lift).

  The lift says how many times as often it is as if each token's experts were
  drawn apart. First come pairs that are the most above it.
  """
  E = decisions.num_experts
  ones = np.ones(decisions.expert.size)
  shape = tokens, E
  reads = scipy.sparse.csr_matrix(
    (ones, (decisions.token, decisions.expert)), shape
  )
  both = scipy.sparse.triu(reads.T @ reads, k=1).tocoo()
  own = decisions.per_expert()
  lift = both.data * tokens / (own[both.row] * own[both.col])
  for i in np.argsort(-both.data * np.log(lift), kind="stable"):
    pair = int(both.row[i]), int(both.col[i])
    yield *pair, int(both.data[i]), float(lift[i])


def alike(
  cosines: Float[np.ndarray, "E E"], number: int
) -> list[tuple[int, int, float]]:
  """Returns the pairs of experts of the largest cosines, (a, b, cosine)."""
  a, b = np.triu_indices(len(cosines), k=1)
  found = cosines[a, b]
  best = np.argsort(-found, kind="stable")[:number]
  return [(int(a[i]), int(b[i]), float(found[i])) for i in best]


def histogram(
  values: Float[np.ndarray, "N"], bins: int = 24
) -> list[dict[str, float]]:
  """Counts values: rows of `low`, `high` and `count`; NaN counts nowhere."""
  values = values[np.isfinite(values)]
  if not values.size:
    return []
  low, high = np.quantile(values, (0.001, 0.999))
  if low == high:
    low, high = low - 0.5, high + 0.5
  # What is beyond is at the ends.
  count, edges = np.histogram(np.clip(values, low, high), bins, (low, high))
  return [
    {"low": a, "high": b, "count": int(n)}
    for a, b, n in zip(edges[:-1], edges[1:], count, strict=True)
  ]
