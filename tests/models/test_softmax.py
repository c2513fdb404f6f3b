"""The output layer against loops, and the sampler against its own formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.models import softmax

V, D, B, L = 50, 8, 3, 4


@pytest.fixture(scope="module")
def inputs():
  random = np.random.default_rng(0)
  h = random.normal(size=(B, L, D)).astype(np.float32)
  targets = random.integers(0, V, (B, L)).astype(np.int32)
  table = random.normal(size=(V, D)).astype(np.float32)
  return jnp.asarray(h), jnp.asarray(targets), jnp.asarray(table)


def loss(num_samples, train, table, h, targets, seed=0):
  head = softmax.Softmax(V, D, num_samples)
  return head.apply(
    {"params": {"table": table}},
    h,
    targets,
    train=train,
    method="loss",
    rngs={"softmax": jax.random.key(seed)},
  )


def reference(table, h, targets):
  """-log p of the targets, and its gradient by h."""
  table, h, targets = map(np.asarray, (table, h, targets))
  logits = h.astype(np.float64) @ table.T.astype(np.float64)
  chance = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  chosen = np.take_along_axis(chance, targets[..., None], -1)[..., 0]
  return -np.log(chosen), (chance - np.eye(V)[targets]) @ table


# Evaluation is full, whatever training samples; all steps at once, two, one.
@pytest.mark.parametrize(
  "num_samples, train, logits",
  [(0, True, 2**26), (5, False, 2**26), (0, True, 3 * B * V), (0, True, 1)],
)
def test_full_loss_is_minus_log_probability(
  inputs, num_samples, train, logits, monkeypatch
):
  monkeypatch.setattr(softmax, "_LOGITS", logits)
  h, targets, table = inputs
  want, slope = reference(table, h, targets)

  @jax.jit
  def run(h):
    run = functools.partial(loss, num_samples, train, table, targets=targets)
    return run(h=h), jax.grad(lambda h: run(h=h).sum())(h)

  nats, got = run(h)
  np.testing.assert_allclose(nats, want, rtol=1e-5)
  np.testing.assert_allclose(got, slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scores_are_sums_in_float32(inputs, dtype):
  h, _, table = inputs
  h, table = h.astype(dtype), table.astype(dtype)
  params = {"table": table.astype(jnp.float32)}
  got = softmax.Softmax(V, D).apply({"params": params}, h, method="logits")
  assert got.dtype == jnp.float32
  want = np.float64(h) @ np.float64(table).T
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("room", [50, 5])
def test_a_sample_is_what_was_drawn_once_each(room, monkeypatch):
  """And loses its rarest where there is no room."""
  monkeypatch.setattr(softmax, "most_distinct", lambda *_: room)
  key = jax.random.key(1)
  ids, used = softmax.log_uniform(key, 100, V)
  uniform, within = np.float64(jax.random.uniform(key, (2, 100)))
  every = np.exp((uniform + within / 2**23) * np.log(V + 1)).astype(int) - 1
  want = np.unique(np.clip(every, 0, V - 1))
  assert len(want) > 5
  np.testing.assert_array_equal(np.asarray(ids)[np.asarray(used)], want[:room])


@pytest.mark.parametrize(
  "draws, classes", [(64, 300), (500, 1000), (1, 5), (900, V)]
)
def test_samples_find_room_and_fill_it(draws, classes):
  places = softmax.most_distinct(draws, classes)
  keys = jax.random.split(jax.random.key(0), 2000)
  uniform = jax.vmap(lambda key: jax.random.uniform(key, (draws,)))(keys)
  ids = np.exp(np.float64(uniform) * np.log(classes + 1)).astype(int) - 1
  distinct = [len(np.unique(each)) for each in ids]
  assert max(distinct) <= places <= draws
  assert places < np.mean(distinct) + 8 * np.std(distinct) + 1


def test_classes_are_drawn_as_often_as_expected():
  draws, trials = 20, 5000
  keys = jax.random.split(jax.random.key(1), trials)
  ids, used = jax.vmap(lambda key: softmax.log_uniform(key, draws, V))(keys)
  counts = np.bincount(ids[used], minlength=V)
  classes = jnp.arange(V)
  chance = np.exp(softmax.log_expected_count(classes, draws, V))
  # Four standard deviations of a binomial count.
  bound = 4 * np.sqrt(trials * chance * (1 - chance))
  assert (np.abs(counts - trials * chance) < bound).all()


def test_no_word_of_a_large_vocabulary_is_skipped():
  """float32 has too few values to tell the rarest of 793,471 apart."""
  draws, classes = 2**22, 793_471
  ids, used = softmax.log_uniform(jax.random.key(0), draws, classes)
  rarest = np.asarray(ids)[np.asarray(used)] >= 700_000
  chance = softmax.log_expected_count(
    jnp.arange(700_000, classes), draws, classes
  )
  want = np.exp(np.float64(chance)).sum()
  assert abs(rarest.sum() - want) < 5 * np.sqrt(want)


def test_sampled_loss_by_hand(inputs, monkeypatch):
  h, targets, table = inputs
  size, sampled = 7, []

  draw = softmax.log_uniform
  monkeypatch.setattr(
    softmax, "log_uniform", lambda *a: sampled.append(draw(*a)) or sampled[0]
  )
  got = loss(size, True, table, h, targets, seed=3)
  ids, used = map(np.asarray, sampled[0])
  table, h, targets = map(np.asarray, (table, h, targets))
  law = np.log(1 + 1 / (np.arange(V) + 1)) / np.log(V + 1)
  count = 1 - (1 - law) ** size
  for at in np.ndindex(B, L):
    target = targets[at]
    others = [i for i in ids[used] if i != target]
    scores = [h[at] @ table[i] - np.log(count[i]) for i in [target, *others]]
    want = np.log(np.exp(scores).sum()) - scores[0]
    np.testing.assert_allclose(got[at], want, rtol=1e-4)


def test_sampled_loss_and_gradient_near_the_full_ones(inputs):
  h, targets, table = inputs

  def run(num_samples):
    def mean(table):
      return loss(num_samples, True, table, h, targets).mean()

    return jax.jit(jax.value_and_grad(mean))(table)

  (full, slope), (many, near), (few, _) = run(0), run(10_000), run(10)
  np.testing.assert_allclose(many, full, rtol=1e-4)
  np.testing.assert_allclose(near, slope, atol=1e-5)
  assert abs(few - full) > 0.1
