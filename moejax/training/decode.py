"""Search for translations: greedy, and by beam (GNMT, 1609.08144, sec. 7).

Pure functions over one step of a model. All rows are searched side by side in
one loop on the device, which ends with the last of them; no row's result
depends on another row, nor on padding of its source.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from moejax import sharding

# (memory, state, ids [N]) -> state, log probabilities of the next piece [N, V],
# attention over the source [N, M]. Memory and state are trees of arrays with a
# leading axis of N rows.
StepFn = Callable[[Any, Any, Array], tuple[Any, Array, Array]]

# What a translation may have beyond twice its source, for the shortest.
_MORE = 8


class Hypotheses(NamedTuple):
  """Translations of each row, best first: those closed by `</s>`, then others.

  A row may have fewer than it has room for. What is left of the room has
  length 0 and score -inf.

  Attributes:
    ids: pieces; `</s>` from where a translation ends.
    lengths: pieces of each, `</s>` counted.
    scores: what they are sorted by.
    log_probabilities: log P(Y|X), nats.
    attention: over the source places, when each piece was chosen; 0 past the
      end. None where it was not asked for.
  """

  ids: Int32[Array, "B beam L"]
  lengths: Int32[Array, "B beam"]
  scores: Float32[Array, "B beam"]
  log_probabilities: Float32[Array, "B beam"]
  attention: Float32[Array, "B beam L M"] | None


class _Paths(NamedTuple):
  """Hypotheses under way.

  Attributes:
    ids, lengths, attention: as those of `Hypotheses`.
    log_p: log probability so far; -inf where there is no hypothesis.
    coverage: attention that each source place has had, summed over pieces.
  """

  ids: Int32[Array, "B beam L"]
  lengths: Int32[Array, "B beam"]
  attention: Float32[Array, "B beam L M"] | None
  log_p: Float32[Array, "B beam"]
  coverage: Float32[Array, "B beam M"]


class _Search(NamedTuple):
  """What a step of the beam search takes and returns.

  Attributes:
    living: those that go on, by falling log probability.
    finished: those that `</s>` has closed.
    scores: of the finished, falling; -inf where there is none.
    state: the model's, a row for each of the living.
  """

  living: _Paths
  finished: _Paths
  scores: Float32[Array, "B beam"]
  state: Any


def greedy(
  step_fn: StepFn,
  memory: Any,
  state: Any,
  source_mask: Bool[Array, "B M"],
  *,
  start: int,
  end: int,
  max_length: int | None = None,
  attention: bool = False,
) -> Hypotheses:
  """Takes the likeliest piece at every step, the lowest id among equals.

  Args, errors: as those of `beam_search`.

  Returns:
    One hypothesis a row. Its score is its log probability.
  """
  limits, longest = _limits(source_mask, max_length)

  def step(carry):
    paths, going, state = carry
    ids = _last(paths, start)[:, 0]
    state, log_p, weights = step_fn(memory, state, ids)
    best, piece = _top(log_p, 1)
    grown = _append(paths, piece, paths.log_p + best, weights[:, None])
    paths = _where(going, grown, paths)
    going = going & (piece[:, 0] != end) & (paths.lengths[:, 0] < limits)
    return paths, going, state

  carry = _begin(source_mask, 1, longest, end, attention), limits > 0, state
  paths, _, _ = jax.lax.while_loop(lambda carry: carry[1].any(), step, carry)
  return Hypotheses(
    paths.ids, paths.lengths, paths.log_p, paths.log_p, paths.attention
  )


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
  max_length: int | None = None,
  attention: bool = False,
) -> Hypotheses:
  """Finds translations of a high score (GNMT eq. 14).

  score(Y) = log P(Y|X) / lp(Y) + cp(X; Y), with
  lp(Y) = (5 + |Y|)^alpha / (5 + 1)^alpha and
  cp(X; Y) = beta * sum_i log min(sum_j p_ij, 1), p_ij being the attention of
  piece j on the source place i.

  At every step the living hypotheses are extended by each piece. Extensions
  whose log probability is more than `prune` below the best one's are not
  followed. Of the rest those by `</s>` that are among the `beam` best are
  finished, and the `beam` best others live on. A finished one is dropped when
  its score is more than `prune` below the best finished one's, or worse than
  `beam` others'. Equals keep the order in which they were found, those found
  together that of their predecessors, then of their ids.

  What GNMT leaves open: |Y| and the sum over j count `</s>`, whose probability
  is in P and whose step attends like any other. A place that no piece attends
  to counts as the smallest positive float32, so a score stays finite. With
  alpha > 0 a longer hypothesis may overtake a finished one although its
  probability only falls; but no continuation of Y, of at most n pieces, scores
  above log P(Y|X) / lp(n), because lp grows, log P is negative and cp at most
  0. A row is done when by that bound no living hypothesis can come to be kept.
  A beam of 1 takes what `</s>` closes first, whatever may overtake it: it finds
  what `greedy` does, by any settings.

  Where the maximum length cuts the living short they are kept without `</s>`,
  by the same rules, but after all finished ones.

  Args:
    step_fn: the model's step.
    memory: of the encoded source, B rows.
    state: before the first step, B rows.
    source_mask: real source places, `</s>` counted. A row without any has one
      translation, which is empty.
    start: id of `<s>`, the first that `step_fn` is given.
    end: id of `</s>`.
    beam: how many hypotheses live at once and are kept.
    alpha: of length normalisation; 0 is none.
    beta: of the coverage penalty; 0 is none.
    prune: nats; infinity is no pruning.
    max_length: pieces of a translation at most, `</s>` counted. By default
      2 * (real source places) + 8.
    attention: return it.

  Raises:
    ValueError: an option is out of its range.
  """
  check_beam(beam)
  for name, value in (("alpha", alpha), ("beta", beta), ("prune", prune)):
    if not value >= 0:
      raise ValueError(f"{name} must be 0 or more, got {value}")
  limits, longest = _limits(source_mask, max_length)

  def score(paths):
    tiny = jnp.finfo(jnp.float32).tiny
    part = jnp.log(jnp.clip(paths.coverage, tiny, 1.0))
    part = jnp.where(source_mask[:, None], part, 0).sum(-1)
    return paths.log_p / _length_penalty(paths.lengths, alpha) + beta * part

  def is_going(search):
    living = search.living
    bound = living.log_p.max(1) / _length_penalty(limits, alpha)
    going = (bound > search.scores[:, -1]) & (living.lengths[:, 0] < limits)
    if beam == 1:
      return going & (search.scores[:, 0] == -jnp.inf)
    return going & (bound >= search.scores[:, 0] - prune)

  def step(search):
    ids = _last(search.living, start).reshape(-1)
    state, log_p, weights = step_fn(memory, search.state, ids)
    log_p, weights = _split(log_p, beam), _split(weights, beam)
    parent, grown = _grow(search.living, log_p, weights, prune)
    *new, kept = _finish(search, grown, score, end)
    state = jax.tree.map(lambda leaf: _split(leaf, beam), state)
    state = jax.tree.map(_merge, _take(state, _take(parent, kept)))
    return _Search(*_where(is_going(search), tuple(new), search[:3]), state)

  none = _begin(source_mask, beam, longest, end, attention)
  no_score = jnp.full(none.log_p.shape, -jnp.inf)
  memory, state = jax.tree.map(
    lambda leaf: jnp.repeat(leaf, beam, axis=0), (memory, state)
  )
  search = jax.lax.while_loop(
    lambda search: is_going(search).any(),
    step,
    _Search(none, none, no_score, state),
  )
  # Where the maximum length cut nothing, none of the living come to be kept.
  return _sorted(search, score(search.living), prune, end)


def check_beam(beam: int) -> None:
  """Refuses a search that keeps no hypothesis.

  Raises:
    ValueError: beam is below 1.
  """
  if beam < 1:
    raise ValueError(f"a beam of {beam} holds nothing; give 1 or more")


def _limits(
  source_mask: Bool[Array, "B M"], max_length: int | None
) -> tuple[Int32[Array, "B"], int]:
  """Returns the maximum length of each row, and of all."""
  if max_length is not None and max_length < 1:
    raise ValueError(
      f"a max_length of {max_length} has no room for `</s>`; give 1 or more"
    )
  places = source_mask.sum(1)
  if max_length is None:
    longest = 2 * source_mask.shape[1] + _MORE
    limits = 2 * places + _MORE
  else:
    longest = max_length
    limits = jnp.full_like(places, max_length)
  return jnp.where(places > 0, limits, 0), longest


def _length_penalty(lengths: Int[Array, "*N"], alpha: float) -> Array:
  return ((5 + lengths).astype(jnp.float32) / 6) ** alpha


def _begin(
  source_mask: Bool[Array, "B M"],
  beam: int,
  longest: int,
  end: int,
  attention: bool,
) -> _Paths:
  """Returns one empty hypothesis a row, and room for more."""
  rows, places = source_mask.shape
  size = rows, beam
  log_p = jnp.where(jnp.arange(beam) == 0, 0.0, -jnp.inf)
  return _Paths(
    ids=jnp.full((*size, longest), end, jnp.int32),
    lengths=jnp.zeros(size, jnp.int32),
    attention=jnp.zeros((*size, longest, places)) if attention else None,
    log_p=jnp.broadcast_to(log_p.astype(jnp.float32)[None], size),
    coverage=jnp.zeros((*size, places)),
  )


def _last(paths: _Paths, start: int) -> Int32[Array, "B beam"]:
  """Returns the last piece of each, `start` where there is none."""
  at = jnp.maximum(paths.lengths - 1, 0)[..., None]
  last = jnp.take_along_axis(paths.ids, at, axis=2)[..., 0]
  return jnp.where(paths.lengths > 0, last, start)


def _append(
  paths: _Paths,
  piece: Int32[Array, "B beam"],
  log_p: Float32[Array, "B beam"],
  weights: Float[Array, "B beam M"],
) -> _Paths:
  """Makes each one piece longer."""
  here = jnp.arange(paths.ids.shape[2])[None, None] == paths.lengths[..., None]
  attention = paths.attention
  if attention is not None:
    attention = jnp.where(here[..., None], weights[:, :, None], attention)
  return _Paths(
    ids=jnp.where(here, piece[..., None], paths.ids),
    lengths=paths.lengths + 1,
    attention=attention,
    log_p=log_p,
    coverage=paths.coverage + weights,
  )


def _grow(
  living: _Paths,
  log_p: Float32[Array, "B beam V"],
  weights: Float[Array, "B beam M"],
  prune: float,
) -> tuple[Int32[Array, "B beam_2"], _Paths]:
  """Returns the best 2 * beam extensions, and whose they are.

  Each of the living has but one that ends, so `beam` of them can go on. The log
  probability of those that are not to be followed is -inf.
  """
  rows, beam, vocabulary = log_p.shape
  total = (living.log_p[..., None] + log_p).reshape(rows, -1)
  best, index = _top(total, 2 * beam)
  # Were it best[:, :1], XLA would sort the whole vocabulary on CPU.
  floor = best.max(1, keepdims=True) - prune
  best = jnp.where(best >= floor, best, -jnp.inf)
  parent, piece = index // vocabulary, index % vocabulary
  living, weights = _take((living, weights), parent)
  return parent, _append(living, piece, best, weights)


def _finish(
  search: _Search, grown: _Paths, score: Callable[..., Array], end: int
) -> tuple[_Paths, _Paths, Array, Int32[Array, "B beam"]]:
  """Parts the extensions: returns living, finished, scores, who lives on."""
  beam = search.scores.shape[1]
  ends = _last(grown, end) == end
  closed = ends & (jnp.arange(2 * beam) < beam)[None]
  new = jnp.where(closed, score(grown), -jnp.inf)
  scores, kept = _top(_join(search.scores, new), beam)
  finished = _take(jax.tree.map(_join, search.finished, grown), kept)
  log_p, kept = _top(jnp.where(ends, -jnp.inf, grown.log_p), beam)
  return _take(grown, kept)._replace(log_p=log_p), finished, scores, kept


def _sorted(
  search: _Search, cut: Float32[Array, "B beam"], prune: float, end: int
) -> Hypotheses:
  """Puts the finished first, then the living, which score `cut`."""
  beam = cut.shape[1]
  cut, order = _top(cut, beam)
  paths = jax.tree.map(_join, search.finished, _take(search.living, order))
  scores = _join(search.scores, cut)
  scores = jnp.where(scores >= scores[:, :1] - prune, scores, -jnp.inf)
  order = jnp.argsort(scores == -jnp.inf, axis=1, stable=True)[:, :beam]
  paths, scores = _take((paths, scores), order)
  there = scores > -jnp.inf
  attention = paths.attention
  if attention is not None:
    attention = jnp.where(there[..., None, None], attention, 0)
  return Hypotheses(
    ids=jnp.where(there[..., None], paths.ids, end),
    lengths=jnp.where(there, paths.lengths, 0),
    scores=scores,
    log_probabilities=jnp.where(there, paths.log_p, -jnp.inf),
    attention=attention,
  )


def _top(x: Float32[Array, "B N"], k: int) -> tuple[Array, Array]:
  """Returns the k largest of each row and where they are, first ones first."""

  def find(x):
    return tuple(jax.lax.top_k(x, k))

  rows = ("batch", None)
  # On its own XLA would bring all rows together on every device.
  return sharding.manual(find, (rows,), (rows, rows))(x)


def _take(tree: Any, index: Int[Array, "B J"]) -> Any:
  """Takes hypotheses of each row: leaves [B, beam, ...] -> [B, J, ...]."""
  return jax.tree.map(
    lambda leaf: jax.vmap(lambda row, at: row[at])(leaf, index), tree
  )


def _where(rows: Bool[Array, "B"], new: Any, old: Any) -> Any:
  """Chooses between two trees row by row."""

  def choose(a, b):
    return jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b)

  return jax.tree.map(choose, new, old)


def _join(a: Array, b: Array) -> Array:
  return jnp.concatenate([a, b], axis=1)


def _split(leaf: Array, beam: int) -> Array:
  """[B * beam, ...] -> [B, beam, ...]."""
  return leaf.reshape(-1, beam, *leaf.shape[1:])


def _merge(leaf: Array) -> Array:
  """[B, beam, ...] -> [B * beam, ...]."""
  return leaf.reshape(-1, *leaf.shape[2:])
