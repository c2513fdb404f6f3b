"""Balance losses against the paper's loops, and how layers add up."""

import functools

import decisions
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import reference_losses
from decisions import CASES, G, P, Q

from moejax import gating, losses, sharding

# -- the same in loops, of decisions in NumPy ---------------------------------


def want_importance(r, scope):
  return reference_losses.cv_loss(r.importance, scope)


def want_load(r, scope):
  if r.primary is None:
    return reference_losses.cv_loss(r.load, scope)
  reached = r.primary.count - r.primary.dropped
  loads = [r.primary.load, r.load.reshape(G, P, Q), reached]
  if scope == "batch":
    loads = [load.sum(axis=0, keepdims=True) for load in loads]
  vectors = map(reference_losses.hierarchical_load, *loads)
  return reference_losses.cv_loss(list(vectors), "group")


def want_switch_balance(r, scope):
  total = 0
  for level, mixtures in decisions.levels(r):
    groups = decisions.tokens(level, mixtures)
    if scope == "batch":
      groups = [[np.concatenate(parts) for parts in zip(*groups, strict=True)]]
    total += np.mean(
      [reference_losses.switch_balance(group) for group in groups]
    )
  return total


def want_z(r, scope):
  del scope
  total = 0
  for level, mixtures in decisions.levels(r):
    groups = decisions.tokens(level, mixtures)
    total += reference_losses.z_loss(
      np.concatenate([v for g in groups for v in g])
    )
  return total


def want_threshold(r, scope):
  del scope
  total = 0
  for level, _ in decisions.levels(r):
    *mixtures, _, _, experts = level.logits.shape
    thresholds = level.thresholds.reshape(*mixtures, experts)
    for at in np.ndindex(level.logits.shape[:-2]):
      total += reference_losses.threshold_loss(
        level.logits[at],
        thresholds[at[:-1]],
        decisions.edges(level, at),
        None if level.mask is None else level.mask[at],
      )
  return total


def want_bias(r, scope):
  del scope
  total = 0
  for level, mixtures in decisions.levels(r):
    counts = level.count.sum(axis=0).reshape(mixtures, -1)
    for count, bias in zip(
      counts, level.bias.reshape(mixtures, -1), strict=True
    ):
      total -= np.dot(bias, reference_losses.bias_rule(count, 1))
  return total


def want_targets(r, k):
  """Of each level: targets of thresholds and biases [P, E], NaN without."""
  found = []
  for level, mixtures in decisions.levels(r):
    groups = decisions.tokens(level, mixtures)
    E = level.logits.shape[-1]
    bias = level.bias.reshape(mixtures, E)
    targets = np.full((2, mixtures, E), np.nan)
    for p in range(mixtures):
      tokens = np.concatenate([group[p] for group in groups])
      if len(tokens):
        targets[0, p] = reference_losses.threshold_targets(tokens, k)
        targets[1, p] = reference_losses.bias_targets(tokens, bias[p], k)
    found.append(targets)
  return found


# Of each loss: its loops, and what its gradient reaches, 0 elsewhere.
WANT = {
  "importance": (want_importance, "importance"),
  "load": (want_load, "load"),
  "switch_balance": (want_switch_balance, "logits"),
  "z": (want_z, "logits"),
  "threshold": (want_threshold, "thresholds"),
  "bias": (want_bias, "bias"),
}


def want(name, decision, scope="batch"):
  return WANT[name][0](decisions.as_numpy(decision), scope)


def parts(decision):
  """All of a decision that a gradient could reach, by level and name."""
  names = ("importance", "load", "logits", "thresholds", "bias", "count")
  return {
    f"{i} {name}": getattr(level, name)
    for i, (level, _) in enumerate(decisions.levels(decision))
    for name in names
  }


def put(decision, values):
  """The decision with other parts."""
  levels = [level for level, _ in decisions.levels(decision)]
  for at, value in values.items():
    i, name = at.split()
    levels[int(i)] = levels[int(i)]._replace(**{name: value})
  return functools.reduce(lambda above, r: r._replace(primary=above), levels)


@functools.cache
def values_and_slopes(case, scope):
  """Of every loss; compiled as one."""

  @jax.jit
  def all_losses(values):
    def of(loss):
      return jax.value_and_grad(
        lambda values: loss(put(CASES[case], values), scope)
      )(values)

    return {name: of(loss) for name, loss in losses.LOSSES.items()}

  return jax.device_get(all_losses(parts(CASES[case])))


@pytest.mark.parametrize("scope", losses.SCOPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", sorted({*losses.LOSSES} - {"quantile"}))
def test_value_and_gradient_are_the_papers(name, case, scope):
  if name not in WANT:
    pytest.fail(
      f"losses.LOSSES[{name!r}] has no reference: write it into"
      " tests/reference.py and a line into WANT of tests/test_losses.py"
    )
  in_loops, reached = WANT[name]
  decision = decisions.as_numpy(CASES[case])
  value, slopes = values_and_slopes(case, scope)[name]
  np.testing.assert_allclose(value, in_loops(decision, scope), rtol=1e-5)
  by_hand = reference.gradient(
    lambda values: in_loops(put(decision, values), scope),
    {at: v for at, v in parts(decision).items() if at.endswith(f" {reached}")},
  )
  assert max(np.abs(slope).max() for slope in by_hand.values()) > 1e-3
  for at, slope in slopes.items():
    if at in by_hand:
      np.testing.assert_allclose(slope, by_hand[at], rtol=1e-4, atol=1e-6)
    else:
      assert (slope == 0).all(), at


@pytest.mark.parametrize(
  "x, want",
  [
    ([1.0, 2.0, 3.0], 2 / 3 / 4),
    ([0.0, 0.0, 8.0, 0.0], 3.0),
    ([5.0, 5.0, 5.0], 0.0),
    ([0.0, 0.0], 0.0),
    ([7.0], 0.0),
  ],
)
def test_cv_squared_of_a_population(x, want):
  value, slope = jax.value_and_grad(losses.cv_squared)(jnp.asarray(x))
  np.testing.assert_allclose(value, want, atol=1e-6)
  np.testing.assert_allclose(reference_losses.cv_squared(x), want, atol=1e-12)
  if want == 0:  # Finite at perfect balance, and zero.
    assert (np.asarray(slope) == 0).all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scope", losses.SCOPES)
def test_nothing_but_padding_costs_nothing(case, scope):
  hidden = decisions.hide(CASES[case])

  @jax.jit
  def slopes(values):
    def total(values):
      found = put(hidden, values)
      return sum(loss(found, scope) for loss in losses.LOSSES.values())

    return jax.value_and_grad(total)(values)

  for leaf in jax.tree.leaves(slopes(parts(hidden))):
    assert (leaf == 0).all()


# -- what is learned beside the router ----------------------------------------


@pytest.mark.parametrize("count", [[3.0, 5, 4], [6.0, 0, 0], [1e6, 1e6, 0]])
def test_descent_on_biases_is_the_rule(count):
  level = decisions.make_level(0, 1, 3, (1, 3))
  level = level._replace(count=jnp.asarray([count]))
  slope = jax.grad(lambda b: losses.bias(level._replace(bias=b)))(level.bias)
  rule = np.float32(reference_losses.bias_rule(count, 0.01))
  np.testing.assert_array_equal(-np.float32(0.01) * slope, rule)


def test_balanced_counts_move_no_bias(experts=49):
  """However their mean would round."""
  level = decisions.make_level(0, 1, experts, (1, experts))
  for each in (1, 49, 199):
    count = jnp.full((1, experts), each, jnp.float32)
    assert losses.bias(level._replace(count=count)) == 0


def following(decision, k):
  """The decision, whose thresholds and biases follow quantiles."""

  def follow(level):
    return level._replace(k=jnp.full(level.bias.size, k, jnp.int32))

  primary = decision.primary
  return follow(decision)._replace(primary=primary and follow(primary))


def tied(decision):
  """The same, of few different tokens, and one group of experts without."""
  logits, mask = jnp.round(decision.logits), decision.mask
  if decision.primary is not None:
    mask = mask.at[1].set(False)
  return decision._replace(logits=logits, mask=mask)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("change", [lambda r: r, tied])
@pytest.mark.parametrize("case", CASES)
def test_quantiles_draw_thresholds_and_biases(case, change, k):
  """Value - target is the gradient of each, and all that has one."""
  decision = following(change(CASES[case]), k)
  fn = lambda at: losses.quantile(put(decision, at), "group")  # noqa: E731
  value, slopes = jax.jit(jax.value_and_grad(fn))(parts(decision))
  total = 0
  wanted = want_targets(decisions.as_numpy(decision), k)
  for i, (level, _) in enumerate(decisions.levels(decision)):
    for name, targets in zip(("thresholds", "bias"), wanted[i], strict=True):
      values = np.asarray(getattr(level, name), np.float64)
      away = np.nan_to_num(values - targets.reshape(-1))
      total += (away**2).sum() / 2
      np.testing.assert_allclose(slopes.pop(f"{i} {name}"), away, atol=1e-6)
  np.testing.assert_allclose(value, total, rtol=1e-5)
  assert total > 0.1 and not any(map(np.any, slopes.values()))
  # What follows quantiles is taught by nothing else.
  assert losses.threshold(decision) == losses.bias(decision) == 0


# -- adding up ----------------------------------------------------------------


@pytest.mark.parametrize("scope", losses.SCOPES)
def test_auxiliary_adds_layers_and_weighs(scope):
  first, second = CASES["flat"], CASES["hierarchy"]
  sown = {
    "a": {"moe": {"routing": (first,)}},
    "b": {"routing": (second,)},
  }
  assert [id(r) for r in losses.routings(sown)] == [id(first), id(second)]
  weights = {"importance": 0.1, "load": 0.3}
  total, values = losses.auxiliary(sown, weights, scope)
  by_hand = {n: want(n, first, scope) + want(n, second, scope) for n in weights}
  assert set(values) == {"importance", "load"}
  for name, value in values.items():
    np.testing.assert_allclose(value, by_hand[name], rtol=1e-5)
  np.testing.assert_allclose(
    total, 0.1 * by_hand["importance"] + 0.3 * by_hand["load"], rtol=1e-5
  )
  if scope == "batch":
    assert losses.auxiliary(sown, weights)[0] == total


def test_without_weights_nothing_is_lost():
  total, values = losses.auxiliary({}, {"load": 0.0, "threshold": 0.0})
  assert total == 0 and values["load"] == values["threshold"] == 0
  assert losses.auxiliary(CASES["flat"], {}) == (0, {})


def test_unknown_names_are_told_the_known():
  with pytest.raises(ValueError, match="'laod'.*nearest is 'load'.*importance"):
    losses.auxiliary(CASES["flat"], {"importance": 0.1, "laod": 0.1})
  for wrong in (losses.auxiliary, losses.load):
    args = ({}, {}) if wrong is losses.auxiliary else (CASES["flat"],)
    with pytest.raises(ValueError, match="'device'; choose 'batch' or 'group'"):
      wrong(*args, "device")


@pytest.mark.parametrize("name", ["threshold", "bias"])
def test_a_weight_for_what_no_layer_learns(name):
  """An error, unless another layer learns it."""
  learning = CASES["flat"]
  other = learning._replace(thresholds=None, bias=None)
  match = f"'{name}' has weight 0.5, but of 2 MoE layers 0 .* by it;"
  for not_so in (other, following(learning, 1)):
    with pytest.raises(ValueError, match=match):
      losses.auxiliary([other, not_so], {name: 0.5})
  with pytest.raises(ValueError, match=match.replace(name, "quantile")):
    losses.auxiliary([other, learning], {"quantile": 0.5})
  total, _ = losses.auxiliary([other, learning], {name: 0.5})
  np.testing.assert_allclose(total, 0.5 * want(name, learning), rtol=1e-5)


@pytest.mark.parametrize("weights", [{}, {"importance": 0.1}])
def test_quantiles_that_nothing_follows(weights):
  with pytest.raises(ValueError, match="'quantile' has no weight, .* as 0.1"):
    losses.auxiliary(following(CASES["flat"], 1), weights)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.5, float("nan")])
def test_the_weight_of_quantiles_is_a_rate(rate):
  with pytest.raises(ValueError, match=f"weight {rate}, .* at most 1 .* leave"):
    losses.auxiliary(following(CASES["flat"], 1), {"quantile": rate})


def test_devices_exchange_sums_and_gather_no_tokens():
  layout = sharding.LAYOUTS["expert"]
  mesh = sharding.make_mesh(layout)
  lie = sharding.batch_sharding(layout, mesh, 8)
  random = np.random.default_rng(0)
  logits = jnp.asarray(random.normal(size=(8, 6, 4)), jnp.float32)
  vector = jnp.full(4, 0.2, jnp.float32)

  def all_losses(decision):
    decision = decision._replace(thresholds=vector, bias=vector)
    values = {
      (name, scope): loss(decision, scope)
      for name, loss in losses.LOSSES.items()
      for scope in losses.SCOPES
    }
    quantile = losses.quantile(following(decision, 2))
    return losses.balance(decision), values, quantile

  decision = gating.balanced(logits, 2)
  want = jax.jit(all_losses)(decision)
  spread = jax.device_put(decision, lie)
  compiled = jax.jit(all_losses).lower(spread).compile()
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6),
    compiled(spread),
    want,
  )
  text = compiled.as_text()
  assert "all-reduce(" in text
  for kind in ("all-gather", "all-to-all", "collective-permute"):
    assert f"{kind}(" not in text and f"{kind}-start(" not in text
