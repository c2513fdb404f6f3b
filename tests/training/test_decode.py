"""Searches against NumPy: every translation, and a beam that never stops."""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import sharding
from moejax.planning import collectives
from moejax.training import decode

START, END = 1, 2
B, M, V = 16, 5, 4
SOURCE = np.arange(M)[None] < 1 + np.arange(B)[:, None] % M
# A prefix of pieces is a number, and this many of them are told apart.
PREFIXES = 4099
INF = math.inf


@functools.cache
def tables(kind):
  """Log probabilities and attention after each prefix, for each row.

  With "ties" log probabilities are whole numbers: sums of them are exact. With
  "long" most translations do not end. With "lost" the only good one is empty,
  and from any other none gets away. With "early" the empty one is likeliest,
  but a longer one scores above it.
  """
  random = np.random.default_rng(0)
  if kind == "ties":
    log_p = -random.integers(1, 3, (B, PREFIXES, V))
  else:
    log_p = 1.5 * random.normal(size=(B, PREFIXES, V))
    log_p[..., END] -= 8 * (kind == "long")
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
  if kind == "lost":
    log_p[:] = [-0.5, -9, -9, -9]
    log_p[:, START] = [-2, -9, -0.1, -9]
  if kind == "early":
    log_p[:] = [-9, -9, -0.01, -9]
    log_p[:, START] = [-9, -0.7, -0.69, -9]
  weights = np.exp(2 * random.normal(size=(B, PREFIXES, M)))
  weights = np.where(SOURCE[:, None], weights, 0)
  weights /= weights.sum(-1, keepdims=True)
  return log_p.astype(np.float32), weights.astype(np.float32)


def step(kind, memory, prefix, ids):
  """A model whose next piece depends on the row and on all pieces before."""
  row, source = memory
  prefix = (prefix * V + ids) % PREFIXES
  log_p, weights = (jnp.asarray(table)[row, prefix] for table in tables(kind))
  more = source.shape[1] - M
  return prefix, log_p, jnp.pad(weights, ((0, 0), (0, more))) * source


class Found(NamedTuple):
  """A translation, by hand."""

  ids: tuple[int, ...] = ()
  log_p: float = 0.0
  attention: tuple[np.ndarray, ...] = ()

  def grow(self, kind, row):
    prefix = 0
    for piece in (START, *self.ids):
      prefix = (prefix * V + piece) % PREFIXES
    log_p, weights = (
      table[row, prefix].astype(float) for table in tables(kind)
    )
    for piece in range(V):
      yield Found(
        (*self.ids, piece),
        self.log_p + log_p[piece],
        (*self.attention, weights),
      )

  @property
  def ends(self):
    return self.ids[-1] == END

  def score(self, row, alpha, beta):
    """Equation 14, term by term."""
    coverage = 0.0
    for place in range(M):
      if SOURCE[row, place]:
        seen = sum(weights[place] for weights in self.attention)
        coverage += math.log(min(seen, 1.0))
    penalty = (5 + len(self.ids)) ** alpha / (5 + 1) ** alpha
    return self.log_p / penalty + beta * coverage


def best_first(found, row, alpha, beta):
  return sorted(found, key=lambda each: -each.score(row, alpha, beta))


def everything(kind, row, length, alpha, beta):
  """All translations of at most so many pieces, best first."""
  closed, open_ = [], [Found()]
  for _ in range(length):
    grown = [new for each in open_ for new in each.grow(kind, row)]
    closed += [each for each in grown if each.ends]
    open_ = [each for each in grown if not each.ends]
  return [
    *best_first(closed, row, alpha, beta),
    *best_first(open_, row, alpha, beta),
  ]


def by_hand(kind, row, length, beam, alpha, beta, prune):
  """The beam search, to the maximum length whatever has been found."""
  finished, living = [], [Found()]
  for _ in range(length):
    grown = [new for each in living for new in each.grow(kind, row)]
    grown.sort(key=lambda each: -each.log_p)
    grown = [new for new in grown if new.log_p >= grown[0].log_p - prune]
    finished += [each for each in grown[:beam] if each.ends]
    living = [each for each in grown if not each.ends][:beam]
  finished = best_first(finished, row, alpha, beta)
  floor = finished[0].score(row, alpha, beta) - prune if finished else -INF
  living = best_first(living, row, alpha, beta)
  return [
    each
    for each in finished[:beam] + living
    if each.score(row, alpha, beta) >= floor
  ][:beam]


def run(search, kind, rows=range(B), places=M, **options):
  """Searches some rows, each with padding up to so many places."""
  found = compiled(search, kind, tuple(sorted(options.items())))
  rows = jnp.asarray(rows, jnp.int32)
  source = np.zeros((len(rows), places), np.bool_)
  source[:, :M] = SOURCE[np.asarray(rows)]
  return jax.device_get(found(rows, jnp.asarray(source)))


@functools.cache
def compiled(search, kind, options):
  def found(rows, source):
    return search(
      functools.partial(step, kind),
      (rows, source),
      jnp.zeros_like(rows),
      source,
      start=START,
      end=END,
      **dict(options),
    )

  return jax.jit(found)


def listed(got, row):
  """The hypotheses of a row."""
  lengths = got.lengths[row].tolist()
  assert 0 not in lengths[: np.isfinite(got.scores[row]).sum()]
  return [
    tuple(ids[:length])
    for ids, length in zip(got.ids[row].tolist(), lengths, strict=True)
    if length
  ]


def assert_found(got, row, want, alpha, beta):
  assert listed(got, row) == [each.ids for each in want]
  scores = [each.score(row, alpha, beta) for each in want]
  log_p = [each.log_p for each in want]
  count = len(want)
  np.testing.assert_allclose(got.scores[row, :count], scores, rtol=1e-5)
  np.testing.assert_allclose(
    got.log_probabilities[row, :count], log_p, rtol=1e-5
  )
  assert (got.scores[row, count:] == -INF).all()
  assert (got.log_probabilities[row, count:] == -INF).all()


@pytest.mark.parametrize("alpha, beta", [(0.2, 0.2), (1.0, 0.5)])
def test_a_wide_beam_finds_everything_in_order(alpha, beta):
  length = 4
  got = run(
    decode.beam_search,
    "plain",
    beam=128,
    alpha=alpha,
    beta=beta,
    prune=INF,
    max_length=length,
  )
  reordered = 0
  for row in range(B):
    want = everything("plain", row, length, alpha, beta)
    assert len(want) == 121
    assert_found(got, row, want, alpha, beta)
    closed = [each.log_p for each in want if each.ends]
    reordered += closed != sorted(closed, reverse=True)
  assert reordered == B


# Kind of table, beam, alpha, beta, prune, maximum length.
NARROW = [
  ("plain", 3, 0.0, 0.0, INF, 6),
  ("plain", 3, 0.2, 0.2, 3.0, None),
  ("plain", 4, 1.0, 0.5, 1.5, 8),
  ("plain", 8, 0.6, 0.0, INF, 12),
  ("long", 3, 0.2, 0.2, 3.0, None),
  ("ties", 3, 0.0, 0.0, 1.0, 5),
  ("ties", 4, 0.0, 0.0, INF, None),
]


@pytest.mark.parametrize("kind, beam, alpha, beta, prune, max_length", NARROW)
def test_it_stops_only_when_nothing_can_change(
  kind, beam, alpha, beta, prune, max_length
):
  settings = {"beam": beam, "alpha": alpha, "beta": beta, "prune": prune}
  got = run(
    decode.beam_search,
    kind,
    rows=range(B) if max_length else range(5),
    max_length=max_length,
    **settings,
  )
  for row in range(len(got.ids)):
    length = max_length or 2 * int(SOURCE[row].sum()) + 8
    want = by_hand(kind, row, length, **settings)
    assert_found(got, row, want, alpha, beta)
    assert got.scores[row, 0] - prune <= min(got.scores[row, : len(want)])


@pytest.mark.parametrize("kind", ["plain", "lost"])
def test_it_does_stop(kind):
  steps = []

  def counted(*args):
    jax.debug.callback(lambda: steps.append(1))
    return step(kind, *args)

  @jax.jit
  def found(rows, source):
    first = jnp.zeros_like(rows)
    settings = {"start": START, "end": END, "beam": 4, "max_length": 100}
    return decode.beam_search(
      counted, (rows, source), first, source, **settings
    )

  got = jax.device_get(found(jnp.arange(B), jnp.asarray(SOURCE)))
  jax.effects_barrier()
  assert got.lengths.max() <= len(steps) < 50


@pytest.mark.parametrize("kind, max_length", [("plain", None), ("ties", 3)])
def test_a_beam_of_one_is_greedy(kind, max_length):
  free = {"alpha": 0.0, "beta": 0.0, "prune": INF}
  got = run(decode.greedy, kind, max_length=max_length)
  beam = run(decode.beam_search, kind, beam=1, max_length=max_length, **free)
  jax.tree.map(np.testing.assert_array_equal, got, beam)
  for row in range(B):
    length = max_length or 2 * int(SOURCE[row].sum()) + 8
    assert_found(got, row, by_hand(kind, row, length, 1, **free), 0.0, 0.0)


def test_a_beam_of_one_is_greedy_by_any_settings():
  got = run(decode.greedy, "early")
  assert (got.lengths == 1).all()
  beam = run(decode.beam_search, "early", beam=1)
  for name in ("ids", "lengths", "log_probabilities"):
    np.testing.assert_array_equal(getattr(got, name), getattr(beam, name))
  wider = run(decode.beam_search, "early", beam=2)
  assert (wider.lengths[:, 0] == 2).all()


def test_the_maximum_length_leaves_translations_open():
  got = run(decode.beam_search, "plain", beam=6, prune=INF, max_length=2)
  for row in range(B):
    ends = [ids[-1] == END for ids in listed(got, row)]
    assert len(ends) == 6
    assert ends == sorted(ends, reverse=True)
    assert True in ends and False in ends
  assert (np.diff(got.scores) > 0).any(), "an open one may score better"


SEARCHES = [
  (decode.greedy, ()),
  (decode.beam_search, (("beam", 3),)),
]


@pytest.mark.parametrize("search, options", SEARCHES)
def test_a_row_depends_on_no_other_and_not_on_padding(search, options):
  options = dict(options, attention=True)
  want = run(search, "plain", **options)
  assert len(set(want.lengths[:, 0].tolist())) > 2
  order = np.random.default_rng(1).permutation(B)
  got = run(search, "plain", rows=order, **options)
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, b[order]), got, want
  )
  # Two rows of three are the same: the batch ends when this one does.
  some = [3, 3, 9]
  got = run(search, "plain", rows=some, places=M + 3, **options)
  length = want.ids.shape[2]
  for name in ("lengths", "scores", "log_probabilities"):
    np.testing.assert_array_equal(getattr(got, name), getattr(want, name)[some])
  np.testing.assert_array_equal(got.ids[..., :length], want.ids[some])
  np.testing.assert_array_equal(
    got.attention[:, :, :length, :M], want.attention[some]
  )
  assert not got.attention[..., M:].any()


@pytest.mark.parametrize("search, options", SEARCHES)
def test_attention_is_that_of_each_piece(search, options):
  options = dict(options, attention=True)
  got = run(search, "plain", **options)
  weights = tables("plain")[1]
  for row, rank in itertools.product(range(B), range(got.ids.shape[1])):
    prefix, before = 0, START
    length = got.lengths[row, rank]
    for place in range(length):
      prefix = (prefix * V + before) % PREFIXES
      before = int(got.ids[row, rank, place])
      np.testing.assert_array_equal(
        got.attention[row, rank, place], weights[row, prefix]
      )
    assert not got.attention[row, rank, length:].any()
    assert (got.ids[row, rank, length:] == END).all()


@pytest.mark.parametrize("search, options", SEARCHES)
def test_no_source_is_translated_by_nothing(search, options):
  options = dict(options, attention=True)
  found = compiled(search, "plain", tuple(sorted(options.items())))
  source = SOURCE.copy()
  source[4] = False
  got = found(jnp.arange(B), jnp.asarray(source))
  assert got.lengths[4, 0] == 0
  assert got.scores[4, 0] == 0
  want = run(search, "plain", **options)
  np.testing.assert_array_equal(got.ids[5:], want.ids[5:])


def test_a_place_without_attention_leaves_scores_finite():
  def nowhere(memory, state, ids):
    del memory, ids
    return state, jnp.full((2, V), -math.log(V)), jnp.zeros((2, M))

  @jax.jit
  def found(source):
    settings = {"start": START, "end": END, "beam": 2, "max_length": 2}
    none = jnp.zeros(1)
    return decode.beam_search(nowhere, none, none, source, **settings)

  got = found(jnp.ones((1, M), jnp.bool_))
  assert np.isfinite(got.scores).all()


@pytest.mark.parametrize("search, options", SEARCHES)
def test_rows_split_over_devices_are_translated_the_same(search, options):
  layout = sharding.LAYOUTS["expert"]
  mesh = sharding.make_mesh(layout)
  where = sharding.batch_sharding(layout, mesh, B)
  args = jax.device_put((jnp.arange(B), jnp.asarray(SOURCE)), where)
  with sharding.use(layout, mesh):
    found = compiled.__wrapped__(search, "plain", options)
    program = found.lower(*args).compile()
  got = program(*args)
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.device_get(got),
    run(search, "plain", **dict(options)),
  )
  assert not got.ids.sharding.is_fully_replicated
  # All that they tell each other is whether to go on.
  exchanged = collectives.read(program.as_text(), mesh)
  assert exchanged
  assert all(each.bytes <= 4 for each in exchanged), exchanged


@pytest.mark.parametrize(
  "options, message",
  [
    ({"beam": 0}, "beam of 0"),
    ({"alpha": -0.1}, "alpha must be 0 or more, got -0.1"),
    ({"beta": -1.0}, "beta must be 0 or more, got -1.0"),
    ({"prune": math.nan}, "prune must be 0 or more, got nan"),
    ({"max_length": 0}, "max_length of 0"),
  ],
)
def test_settings_out_of_range(options, message):
  with pytest.raises(ValueError, match=message):
    run(decode.beam_search, "plain", **options)
