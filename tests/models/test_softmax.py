"""The output layer against loops, and the sampler against its own formula."""

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
  table, h, targets = map(np.asarray, (table, h, targets))
  logits = h.astype(np.float64) @ table.T.astype(np.float64)
  chosen = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
  return np.log(np.exp(logits).sum(-1)) - chosen


def test_full_loss_is_minus_log_probability(inputs):
  h, targets, table = inputs
  got = loss(0, True, table, h, targets)
  np.testing.assert_allclose(got, reference(table, h, targets), rtol=1e-5)


def test_evaluation_is_full_whatever_training_samples(inputs):
  h, targets, table = inputs
  got = loss(5, False, table, h, targets)
  np.testing.assert_allclose(got, reference(table, h, targets), rtol=1e-5)


def test_full_gradient_is_probability_less_one_hot(inputs):
  h, targets, table = inputs
  grad = jax.grad(lambda h: loss(0, True, table, h, targets).sum())(h)
  table, targets = np.asarray(table), np.asarray(targets)
  logits = np.asarray(h) @ table.T
  chance = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  want = (chance - np.eye(V)[targets]) @ table
  np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-5)


def test_logits_agree_with_loss(inputs):
  h, targets, table = inputs
  logits = softmax.Softmax(V, D).apply(
    {"params": {"table": table}}, h, method="logits"
  )
  picked = jnp.take_along_axis(
    jax.nn.log_softmax(logits), targets[..., None], 2
  )
  np.testing.assert_allclose(
    -picked[..., 0], loss(0, False, table, h, targets), rtol=1e-5
  )


def draw(key, draws):
  """The ids of a sample, and those of all its draws, in float64."""
  ids, used = softmax.log_uniform(key, draws, V)
  uniform, within = np.float64(jax.random.uniform(key, (2, draws)))
  every = np.exp((uniform + within / 2**23) * np.log(V + 1)).astype(int) - 1
  return np.asarray(ids)[np.asarray(used)], np.unique(np.clip(every, 0, V - 1))


def test_a_sample_is_what_was_drawn_once_each():
  got, want = draw(jax.random.key(1), 100)
  np.testing.assert_array_equal(got, want)


def test_a_sample_without_room_loses_its_rarest(monkeypatch):
  monkeypatch.setattr(softmax, "most_distinct", lambda *_: 5)
  got, want = draw(jax.random.key(1), 100)
  assert len(want) > 5
  np.testing.assert_array_equal(got, want[:5])


@pytest.mark.parametrize("draws, classes", [(64, 300), (500, 1000), (1, 5)])
def test_samples_find_room_and_fill_it(draws, classes):
  places = softmax.most_distinct(draws, classes)
  keys = jax.random.split(jax.random.key(0), 2000)
  uniform = jax.vmap(lambda key: jax.random.uniform(key, (draws,)))(keys)
  ids = np.exp(np.float64(uniform) * np.log(classes + 1)).astype(int) - 1
  distinct = [len(np.unique(each)) for each in ids]
  assert max(distinct) <= places <= draws
  assert places < np.mean(distinct) + 8 * np.std(distinct) + 1


def test_all_classes_find_room_whatever_is_drawn():
  assert softmax.most_distinct(10_000, V) == V


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
  size = 7
  drawn = []
  original = softmax.log_uniform

  def spy(*args):
    drawn.append(original(*args))
    return drawn[-1]

  monkeypatch.setattr(softmax, "log_uniform", spy)
  got = loss(size, True, table, h, targets, seed=3)
  ids, used = map(np.asarray, drawn[0])
  ids = ids[used]
  table, h, targets = map(np.asarray, (table, h, targets))
  law = np.log(1 + 1 / (np.arange(V) + 1)) / np.log(V + 1)
  count = 1 - (1 - law) ** size
  for b in range(B):
    for place in range(L):
      target = targets[b, place]
      own = h[b, place] @ table[target] - np.log(count[target])
      terms = [own] + [
        h[b, place] @ table[i] - np.log(count[i]) for i in ids if i != target
      ]
      want = np.log(np.sum(np.exp(terms))) - own
      np.testing.assert_allclose(got[b, place], want, rtol=1e-4)


def test_sampled_loss_nears_the_full_one(inputs):
  h, targets, table = inputs
  full = loss(0, True, table, h, targets)
  many = loss(10_000, True, table, h, targets)
  few = loss(10, True, table, h, targets)
  np.testing.assert_allclose(many, full, rtol=1e-4)
  assert np.abs(few - full).max() > 0.1


def test_sampled_gradient_nears_the_full_one(inputs):
  h, targets, table = inputs

  def grad(num_samples):
    return jax.grad(lambda t: loss(num_samples, True, t, h, targets).mean())(
      table
    )

  np.testing.assert_allclose(grad(10_000), grad(0), atol=1e-5)
