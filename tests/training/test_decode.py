"""The beam search against NumPy: every translation, a beam that never stops."""

import functools
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
    for token in range(M):
      if SOURCE[row, token]:
        seen = sum(weights[token] for weights in self.attention)
        coverage += math.log(min(seen, 1.0))
    penalty = (5 + len(self.ids)) ** alpha / (5 + 1) ** alpha
    return self.log_p / penalty + beta * coverage


def by_hand(kind, row, length, beam, alpha, beta, prune):
  """The beam search, to the maximum length whatever has been found."""
  finished, living = [], [Found()]
  for _ in range(length):
    grown = [new for each in living for new in each.grow(kind, row)]
    grown.sort(key=lambda each: -each.log_p)
    grown = [new for new in grown if new.log_p >= grown[0].log_p - prune]
    finished += [each for each in grown[:beam] if each.ends]
    living = [each for each in grown if not each.ends][:beam]
  for found in finished, living:
    found.sort(key=lambda each: -each.score(row, alpha, beta))
  floor = finished[0].score(row, alpha, beta) - prune if finished else -INF
  return [
    each
    for each in finished[:beam] + living
    if each.score(row, alpha, beta) >= floor
  ][:beam]


@functools.cache
def compiled(step_fn, extra, options):
  """A search of translations with so many pieces beyond twice their source."""

  def found(rows, source):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(decode, "EXTRA_PIECES", extra)
      args = step_fn, (rows, source), jnp.zeros_like(rows), source
      return decode.beam_search(*args, start=START, end=END, **dict(options))

  return jax.jit(found)


@functools.cache
def step_of(kind):
  return functools.partial(step, kind)


def run(kind, rows=range(B), tokens=M, extra=8, **options):
  """Searches some rows, each with padding up to so many tokens."""
  rows = jnp.asarray(rows, jnp.int32)
  source = np.zeros((len(rows), tokens), np.bool_)
  source[:, :M] = SOURCE[np.asarray(rows)]
  found = compiled(step_of(kind), extra, tuple(sorted(options.items())))
  return jax.device_get(found(rows, jnp.asarray(source)))


def assert_found(got, index, row, want, alpha, beta):
  count, lengths = len(want), got.lengths[index]
  assert [
    tuple(ids[:length])
    for ids, length in zip(got.ids[index].tolist(), lengths, strict=True)
  ][:count] == [each.ids for each in want]
  scores = [each.score(row, alpha, beta) for each in want]
  np.testing.assert_allclose(got.scores[index, :count], scores, rtol=1e-5)
  np.testing.assert_allclose(
    got.log_p[index, :count], [each.log_p for each in want], rtol=1e-5
  )
  for coverage, each in zip(got.coverage[index], want, strict=False):
    seen = np.sum(each.attention, axis=0)
    np.testing.assert_allclose(coverage[:M], seen, rtol=1e-5)
  # And nothing else; `</s>` fills what is left of the ids.
  assert not lengths[count:].any()
  assert (got.scores[index, count:] == -INF).all()
  assert (got.log_p[index, count:] == -INF).all()
  past = np.arange(got.ids.shape[2]) >= lengths[:, None]
  assert (got.ids[index][past] == END).all()


@pytest.mark.parametrize("alpha, beta", [(0.2, 0.2), (1.0, 0.5)])
def test_a_wide_beam_finds_everything_in_order(alpha, beta):
  """In translations of one token, of four pieces at most."""
  rows = range(0, B, M)
  settings = {"beam": 128, "alpha": alpha, "beta": beta, "prune": INF}
  got = run("plain", rows, extra=2, **settings)
  for index, row in enumerate(rows):
    want = by_hand("plain", row, 4, **settings)
    assert len(want) == 121
    assert_found(got, index, row, want, alpha, beta)
    closed = [each.log_p for each in want if each.ends]
    assert closed != sorted(closed, reverse=True)


# Kind of table, beam, alpha, beta, prune, pieces beyond twice the source.
@pytest.mark.parametrize(
  "kind, beam, alpha, beta, prune, extra",
  [
    ("plain", 3, 0.0, 0.0, INF, 1),
    ("plain", 2, 2.0, 0.2, 3.0, 8),
    ("plain", 4, 1.0, 0.5, 1.5, 3),
    # Cut short: some stay open, and may score better than what has ended.
    ("plain", 8, 0.6, 0.0, INF, 0),
    ("long", 3, 0.2, 0.2, 3.0, 8),
    ("ties", 4, 0.0, 0.0, INF, 8),
  ],
)
def test_it_stops_only_when_nothing_can_change(
  kind, beam, alpha, beta, prune, extra
):
  settings = {"beam": beam, "alpha": alpha, "beta": beta, "prune": prune}
  got = run(kind, extra=extra, **settings)
  # The longer they are the fewer rows loops can do.
  for row in range(B if extra < 8 else M):
    length = 2 * int(SOURCE[row].sum()) + extra
    want = by_hand(kind, row, length, **settings)
    assert_found(got, row, row, want, alpha, beta)


@pytest.mark.parametrize("kind", ["plain", "lost"])
def test_it_does_stop(kind):
  steps = []

  def counted(*args):
    jax.debug.callback(lambda: steps.append(1))
    return step(kind, *args)

  found = compiled.__wrapped__(counted, 100, (("beam", 4),))
  got = jax.device_get(found(jnp.arange(B), jnp.asarray(SOURCE)))
  jax.effects_barrier()
  assert got.lengths.max() <= len(steps) < 50


@pytest.mark.parametrize(
  "kind, settings",
  [
    ("plain", {}),
    ("ties", {"alpha": 0.0, "beta": 0.0, "prune": INF}),
    ("early", {}),
  ],
)
def test_a_beam_of_one_takes_the_likeliest_piece(kind, settings):
  """Whatever may overtake what `</s>` closes first."""
  got = run(kind, beam=1, **settings)
  for row in range(B):
    best, length = Found(), 2 * int(SOURCE[row].sum()) + 8
    while not best.ids or not best.ends and len(best.ids) < length:
      best = max(best.grow(kind, row), key=lambda each: each.log_p)
    assert tuple(got.ids[row, 0, : got.lengths[row, 0]].tolist()) == best.ids
    np.testing.assert_allclose(got.log_p[row, 0], best.log_p, rtol=1e-5)
  if kind == "early":
    assert (run(kind, beam=2).lengths[:, 0] == 2).all()


def test_a_row_depends_on_no_other_and_not_on_padding():
  want = run("plain", beam=3)
  assert len(set(want.lengths[:, 0].tolist())) > 2
  order = np.random.default_rng(1).permutation(B)
  got = run("plain", rows=order, beam=3)
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, b[order]), got, want
  )
  # Two rows of three are the same: the batch ends when this one does.
  some = [3, 3, 9]
  got = run("plain", rows=some, tokens=M + 3, beam=3)
  assert not got.coverage[..., M:].any()
  got = got._replace(
    ids=got.ids[..., : want.ids.shape[2]], coverage=got.coverage[..., :M]
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, b[some]), got, want
  )


@pytest.mark.parametrize("beam", [1, 3])
def test_no_source_is_translated_by_nothing(beam):
  source = SOURCE.copy()
  source[4] = False
  found = compiled(step_of("plain"), 8, (("beam", beam),))
  got = found(jnp.arange(B), jnp.asarray(source))
  assert got.lengths[4, 0] == 0
  assert got.scores[4, 0] == 0
  assert (got.ids[4] == END).all()
  np.testing.assert_array_equal(got.ids[5:], run("plain", beam=beam).ids[5:])


def test_a_token_without_attention_leaves_scores_finite():
  def nowhere(memory, state, ids):
    del memory
    log_p = jnp.full((len(ids), V), -math.log(V))
    return state, log_p, jnp.zeros((len(ids), M))

  found = compiled(nowhere, 0, (("beam", 2),))
  got = found(jnp.arange(1), jnp.ones((1, M), jnp.bool_))
  assert np.isfinite(got.scores).all()


@pytest.mark.parametrize("beam", [1, 3])
def test_rows_split_over_devices_are_translated_the_same(beam):
  layout = sharding.LAYOUTS["expert"]
  mesh = sharding.make_mesh(layout)
  rows = sharding.batch_sharding(layout, mesh, B)
  args = jax.device_put((jnp.arange(B), jnp.asarray(SOURCE)), rows)
  with sharding.use(layout, mesh):
    found = compiled.__wrapped__(step_of("plain"), 8, (("beam", beam),))
    program = found.lower(*args).compile()
  got = program(*args)
  jax.tree.map(
    np.testing.assert_array_equal, jax.device_get(got), run("plain", beam=beam)
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
  ],
)
def test_settings_out_of_range(options, message):
  with pytest.raises(ValueError, match=message):
    run("plain", **options)
