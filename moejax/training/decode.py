"""Search for translations by beam (GNMT, 1609.08144, sec. 7).

Pure functions over one step of a model. All rows are searched side by side in
one loop on the device, which ends with the last of them; no row's result
depends on another row, nor on padding of its source.

The score of a translation Y of X is (GNMT eq. 14)

  score(Y) = log P(Y|X) / lp(Y) + cp(X; Y), with
  lp(Y) = (5 + |Y|)^alpha / (5 + 1)^alpha and
  cp(X; Y) = beta * sum_i log min(sum_j p_ij, 1), p_ij being the attention of
  piece j on the source token i.

At every step the living hypotheses are extended by each piece. Extensions whose
log probability is more than `prune` below the best one's are not followed. Of
the rest those by `</s>` that are among the `beam` best are finished, and the
`beam` best others live on. A finished one is dropped when its score is more
than `prune` below the best finished one's, or worse than `beam` others'. Equals
keep the order in which they were found. What the maximum length cuts short is
kept without `</s>`, by the same rules, but after all finished ones.

What GNMT leaves open (docs/decisions.md, 49, 51): |Y| and the sum over j count
`</s>`, whose probability is in P and whose step attends like any other. A token
that no piece attends to counts as the smallest positive float32, so a score
stays finite. With alpha > 0 a longer hypothesis may overtake a finished one
although its probability only falls; but no continuation of Y, of at most n
pieces, scores above log P(Y|X) / lp(n), because lp grows, log P is negative and
cp at most 0. A row is done when by that bound no living hypothesis can come to
be kept. A beam of 1 is the greedy search, whatever the settings: it takes the
likeliest piece at every step and ends with the first `</s>`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from moejax import partition

# (memory, state, ids [N]) -> state, log probabilities of the next piece [N, V],
# attention over the source [N, M]. Memory and state are trees of arrays with a
# leading axis of N rows.
StepFn = Callable[[Any, Any, Array], tuple[Any, Array, Array]]

# A translation has at most twice the pieces of its source, and these.
EXTRA_PIECES = 8


class Hypotheses(NamedTuple):
  """Translations of each row, best first: those closed by `</s>`, then others.

  Where a row has fewer than the beam holds, the others have length 0 and score
  -inf.
  """

  ids: Int32[Array, "B beam L"]  # Pieces; `</s>` from where a translation ends.
  lengths: Int32[Array, "B beam"]  # Pieces of each, `</s>` counted.
  scores: Float32[Array, "B beam"]  # What they are sorted by.
  log_p: Float32[Array, "B beam"]  # log P(Y|X), nats.
  # Attention that each source token has had, summed over pieces.
  coverage: Float32[Array, "B beam M"]


def beam_search(
  step_fn: StepFn,
  memory: Any,
  state: Any,
  source_mask: Bool[Array, "B M"],
  *,
  start: int,
  end: int,
  beam: int = 8,
  alpha: float = 0.2,
  beta: float = 0.2,
  prune: float = 3.0,
) -> Hypotheses:
  """Finds translations of a high score; ValueError for an option out of range.

  Args:
    step_fn: the model's step, of B * beam rows.
    memory: of B rows.
    state: of B rows, before the first step.
    source_mask: real source tokens, `</s>` counted. A row without any has one
      translation, which is empty.
    start: id of `<s>`, which `step_fn` is given first.
    end: id of `</s>`.
    beam: how many hypotheses live at once and are kept.
    alpha: of length normalization; 0 is none.
    beta: of the coverage penalty; 0 is none.
    prune: nats; infinity is no pruning.
  """
  check_beam(beam)
  for name, value in (("alpha", alpha), ("beta", beta), ("prune", prune)):
    if not value >= 0:
      raise ValueError(f"{name} must be 0 or more, got {value}")
  rows, pieces = len(source_mask), longest(source_mask.shape[1])
  tokens = source_mask.sum(1)
  limits = jnp.where(tokens > 0, longest(tokens), 0)

  def penalty(lengths):
    return ((5 + lengths).astype(jnp.float32) / 6) ** alpha

  def score(paths):
    tiny = jnp.finfo(jnp.float32).tiny
    seen = jnp.log(jnp.clip(paths.coverage, tiny, 1.0))
    seen = jnp.where(source_mask[:, None], seen, 0).sum(-1)
    return paths.log_p / penalty(paths.lengths) + beta * seen

  def is_going(living, finished):
    bound = living.log_p.max(1) / penalty(limits)
    going = (bound > finished.scores[:, -1]) & (living.lengths[:, 0] < limits)
    if beam == 1:
      return going & (finished.scores[:, 0] == -jnp.inf)
    return going & (bound >= finished.scores[:, 0] - prune)

  def step(search):
    living, finished, state = search
    state, log_p, weights = step_fn(memory, state, _last(living).reshape(-1))
    log_p, weights, state = jax.tree.map(
      lambda leaf: leaf.reshape(-1, beam, *leaf.shape[1:]),
      (log_p, weights, state),
    )
    parent, grown = _grow(living, log_p, weights, prune)
    grown = grown._replace(scores=score(grown))
    # Of the extensions by `</s>` the best are finished; the others live on.
    ends = _last(grown) == end
    closes = ends & (jnp.arange(2 * beam) < beam)[None]
    closed = grown._replace(scores=jnp.where(closes, grown.scores, -jnp.inf))
    closed = jax.tree.map(_join, finished, closed)
    closed = _take(closed, _top(closed.scores, beam)[1])
    going = grown._replace(
      log_p=jnp.where(ends, -jnp.inf, grown.log_p),
      scores=jnp.where(ends, -jnp.inf, grown.scores),
    )
    _, kept = _top(going.log_p, beam)
    state = _take(state, _take(parent, kept))
    state = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), state)
    # A row that is done stays as it is.
    done = ~is_going(living, finished)
    living, finished = jax.tree.map(
      lambda new, old: jax.vmap(jnp.where)(done, old, new),
      (_take(going, kept), closed),
      (living, finished),
    )
    return living, finished, state

  # One empty hypothesis a row. `<s>` stands before its pieces until the end.
  size = rows, beam
  log_p = jnp.full(size, -jnp.inf).at[:, 0].set(0)
  ids = jnp.full((*size, pieces + 1), end, jnp.int32).at[..., 0].set(start)
  coverage = jnp.zeros((*size, source_mask.shape[1]))
  first = Hypotheses(ids, jnp.zeros(size, jnp.int32), log_p, log_p, coverage)
  none = first._replace(scores=jnp.full(size, -jnp.inf))
  memory, state = jax.tree.map(
    lambda leaf: jnp.repeat(leaf, beam, axis=0), (memory, state)
  )
  living, finished, _ = jax.lax.while_loop(
    lambda search: is_going(*search[:2]).any(), step, (first, none, state)
  )
  return _best(living, finished, prune, end)


def longest(source_tokens: Any) -> Any:
  """Returns the most pieces of a translation; of each source, of an array."""
  return 2 * source_tokens + EXTRA_PIECES


def check_beam(beam: int) -> None:
  """Raises a ValueError where a search would keep no hypothesis."""
  if beam < 1:
    raise ValueError(f"a beam of {beam} holds nothing; give 1 or more")


def _last(paths: Hypotheses) -> Int32[Array, "B beam"]:
  # Ids have `<s>` in front.
  at = paths.lengths[..., None]
  return jnp.take_along_axis(paths.ids, at, axis=2)[..., 0]


def _grow(
  living: Hypotheses,
  log_p: Float32[Array, "B beam V"],
  weights: Float[Array, "B beam M"],
  prune: float,
) -> tuple[Int32[Array, "B beam_2"], Hypotheses]:
  """Returns the best 2 * beam extensions, and which hypotheses they extend.

  Each of the living has but one that ends, so `beam` of them can go on. The log
  probability of those that are not to be followed is -inf.
  """
  rows, beam, vocabulary = log_p.shape
  total = (living.log_p[..., None] + log_p).reshape(rows, -1)
  best, index = _top(total, 2 * beam)
  # Were it best[:, :1], XLA would sort the whole vocabulary on CPU.
  floor = best.max(1, keepdims=True) - prune
  parent, piece = index // vocabulary, index % vocabulary
  paths, weights = _take((living, weights), parent)
  lengths = paths.lengths + 1
  here = jnp.arange(paths.ids.shape[2])[None, None] == lengths[..., None]
  return parent, paths._replace(
    ids=jnp.where(here, piece[..., None], paths.ids),
    lengths=lengths,
    log_p=jnp.where(best >= floor, best, -jnp.inf),
    coverage=paths.coverage + weights,
  )


def _best(
  living: Hypotheses, finished: Hypotheses, prune: float, end: int
) -> Hypotheses:
  """Puts the finished first, then what the maximum length cut short.

  Where it cut nothing, none of the living come to be kept.
  """
  beam = living.scores.shape[1]
  living = _take(living, _top(living.scores, beam)[1])
  both = jax.tree.map(_join, finished, living)
  kept = both.scores >= finished.scores[:, :1] - prune
  scores = jnp.where(kept, both.scores, -jnp.inf)
  order = jnp.argsort(scores == -jnp.inf, axis=1, stable=True)[:, :beam]
  found = _take(both._replace(scores=scores), order)
  there = found.scores > -jnp.inf
  return found._replace(
    ids=jnp.where(there[..., None], found.ids[..., 1:], end),
    lengths=jnp.where(there, found.lengths, 0),
    log_p=jnp.where(there, found.log_p, -jnp.inf),
  )


def _top(x: Float32[Array, "B N"], k: int) -> tuple[Array, Array]:
  """Returns the k largest of each row and where they are, first ones first."""
  rows = ("batch", None)
  # On its own XLA would bring all rows together on every device.
  find = partition.manual(
    lambda x: tuple(jax.lax.top_k(x, k)), (rows,), (rows, rows)
  )
  return find(x)


def _take(tree: Any, index: Int[Array, "B J"]) -> Any:
  """Takes hypotheses of each row: leaves [B, beam, ...] -> [B, J, ...]."""
  return jax.tree.map(
    lambda leaf: jax.vmap(lambda row, at: row[at])(leaf, index), tree
  )


def _join(a: Array, b: Array) -> Array:
  return jnp.concatenate([a, b], axis=1)
