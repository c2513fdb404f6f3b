"""Two levels against app. B in loops: values, gradients, losses, drops."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
import reference
import reference_losses

from moejax import experts, losses, moe, router

pytestmark = pytest.mark.usefixtures("few_sizes")

P, Q, K, D, F, S, G = 3, 4, 2, 3, 2, 8, 2
MASK = jnp.asarray(np.arange(G * S).reshape(G, S) % 7 > 0)
OUT = np.random.default_rng(8).normal(size=(G, S, D))
KEY = jax.random.key(3)


class Case(NamedTuple):
  """What is compiled as one.

  Strict is app. F, else gating is noisy. Factors are slots over the mean load,
  of groups and of their experts, and capacities what that comes to, 4 being the
  least. Dispatch is how rows move to groups, and within them.
  """

  train: bool = True
  strict: bool = False
  factors: tuple[float | None, float | None] = (0.9, 0.5)
  capacities: tuple[int | None, int | None] = (5, 4)
  masked: bool = True
  dispatch: tuple[str, str] = ("gather", "auto")
  recompute: bool = False
  together: int = 1

  def layer(self):
    gate = router.Balanced if self.strict else router.NoisyTopK
    names = ("capacity_factor", "eval_capacity_factor")
    now, other = names if self.train else names[::-1]
    outer, inner = ({now: factor, other: None} for factor in self.factors)
    between, within = self.dispatch
    inner |= {"dispatch": within, "recompute": self.recompute}
    secondary = moe.MoE(gate(Q, K), experts.FeedForward(Q, F), **inner)
    return moe.HierarchicalMoE(
      gate(P, K), secondary, S, self.together, dispatch=between, **outer
    )

  @property
  def weights(self):
    learned = {"threshold": 0.1} if self.strict and self.train else {}
    return {"importance": 0.3, "load": 0.7} | learned


SLOTS = ("gather", "auto")
DROPLESS = Case(
  factors=(None, None), capacities=(None, None), dispatch=("auto", "auto")
)
CASES = {
  "training": Case(),
  "evaluation": Case(train=False),
  "drop-free slots": DROPLESS._replace(masked=False, dispatch=SLOTS),
  "sorted": DROPLESS._replace(dispatch=("ragged", "ragged"), recompute=True),
  "sorted together": DROPLESS._replace(together=G),
  "sorted thresholds": DROPLESS._replace(train=False, strict=True),
  "strict": Case(strict=True, factors=(1.0, 1.0), capacities=(5, 4)),
  "thresholds": Case(train=False, strict=True, factors=(0.6, 0.5)),
  "together": Case(together=G),
  "strict together": Case(
    strict=True, factors=(1.0, 1.0), capacities=(5, 5), together=G
  ),
}
ALL = pytest.mark.parametrize("name", CASES)


def inputs():
  return 1 + jax.random.normal(jax.random.key(1), (G, S, D))


@functools.cache
def params(strict=False):
  """All random; tokens are drawn to the first group and first experts."""
  module = Case(strict=strict).layer()
  drawn = kinds.random_params(module, inputs())
  for level in (drawn["primary"], drawn["secondary"]["router"]):
    kernel = level["gate"]["kernel"]
    level["gate"]["kernel"] = kernel.at[..., 0].add(1)
    if strict:
      # About the mean of a softmax.
      level["log_thresholds"] = level["log_thresholds"] * 0.3 - 1.5
  return drawn


def arguments(case):
  return {**params(case.strict), "x": inputs()}


close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)


@functools.cache
def compiled(case):
  """{**params, x} -> score, (y, Routing, losses) and the score's gradient."""
  module = case.layer()

  def score(at):
    weights = dict(at)
    y, state = module.apply(
      {"params": weights},
      weights.pop("x"),
      train=case.train,
      mask=MASK if case.masked else None,
      rngs={"router": KEY} if case.train else {},
      mutable=["routing"],
    )
    (routing,) = losses.routings(state)
    aux, values = losses.auxiliary(state, case.weights)
    return (y * jnp.asarray(OUT, y.dtype)).sum() + aux, (y, routing, values)

  return jax.jit(jax.value_and_grad(score, has_aux=True))


@functools.cache
def run(case):
  return compiled(case)(arguments(case))


# -- the same in loops --------------------------------------------------------


def logits_and_std(router, rows):
  std = np.logaddexp(0, rows @ router["noise"]["kernel"]) + 1e-2
  return rows @ router["gate"]["kernel"], std


def decide(case, router, rows, noise, mask=None):
  """By the paper's gate; noise None is evaluation."""
  if case.strict:
    logits = rows @ router["gate"]["kernel"]
    if case.train:
      return reference.balanced(logits, K, mask)
    thresholds = np.exp(router["log_thresholds"])
    return reference.threshold(logits, thresholds, 2 * K, mask)
  logits, std = logits_and_std(router, rows)
  if noise is None:
    return reference.top_k(logits, K, mask)
  return reference.noisy_top_k(logits, noise, std, K, mask)


def in_joint_groups(case, x):
  """Rows of tokens, by the groups of the second level."""
  return np.asarray(x).reshape(-1, case.together * S, *x.shape[2:])


def is_sorted(name):
  return name.startswith("sorted")


def rows_of(routing, i, h):
  """The logits of what tokens h sent to group i of experts, in order."""
  if routing.within is None:
    return routing.logits[i, h][routing.mask[i, h]]
  return routing.logits[h][routing.mask[h] & (routing.within[h] == i)]


def of_group(tree, i):
  return jax.tree.map(lambda leaf: leaf[i], tree)


def in_loops(case, at, noise=None, inner_noise=None):
  """Returns y and what was decided about each group of the second level."""
  inner = at["secondary"]["router"]
  expert = reference.feed_forward(
    {
      name: w.reshape(P * Q, *w.shape[2:])
      for name, w in at["secondary"]["experts"].items()
    }
  )
  primary = []
  for g, rows in enumerate(at["x"]):
    drawn = None if noise is None else noise[g]
    mask = np.asarray(MASK)[g] if case.masked else None
    primary.append(decide(case, at["primary"], rows, drawn, mask))
  outer, within = case.capacities
  y, found = [], []
  for h, rows in enumerate(in_joint_groups(case, at["x"])):

    def in_group(i, tokens, h=h, rows=rows):
      drawn = inner_noise and inner_noise[h][i][: len(tokens)]
      return decide(case, of_group(inner, i), rows[tokens], drawn)

    first = h * case.together
    joint = reference.together(primary[first : first + case.together], outer)
    found.append(reference.two_levels(joint, in_group, within))
    y.append(reference.two_level_mixture(rows, found[-1], expert))
  return np.concatenate(y).reshape(at["x"].shape), found


def recover_noise(case, at, routing):
  """What was drawn: between groups, and within group i for each slot."""
  if case.strict or not case.train:
    return None, None
  logits, std = logits_and_std(at["primary"], at["x"])
  noisy = np.asarray(routing.primary.logits, np.float64)
  noise = (noisy.reshape(logits.shape) - logits) / std
  # Who is sent where does not depend on what is drawn there.
  none_yet = [[np.zeros((G * S, Q))] * P] * G
  _, found = in_loops(case, at, noise, none_yet)
  x = in_joint_groups(case, at["x"])
  inner = [[None] * P for _ in found]
  for h, levels in enumerate(found):
    for i, tokens in enumerate(levels.sent):
      gate = of_group(at["secondary"]["router"], i)
      logits, std = logits_and_std(gate, x[h][tokens])
      noisy = np.asarray(rows_of(routing, i, h), np.float64)
      inner[h][i] = (noisy - logits) / std
  return noise, inner


@functools.cache
def expected(case):
  """The loops' y and decisions, and the noise they were told."""
  at = kinds.in_float64(arguments(case))
  (_, (_, routing, _)), _ = run(case)
  noise = recover_noise(case, at, routing)
  return *in_loops(case, at, *noise), noise


def threshold_loss(case, at, found):
  """Eq. 20, of both levels; but for the thresholds all is held fixed."""
  held = kinds.in_float64(arguments(case))
  x, mask = (in_joint_groups(case, a) for a in (held["x"], MASK))
  levels_of = lambda at: (at["primary"], at["secondary"]["router"])  # noqa: E731
  (outer, inner), (held_outer, held_inner) = map(levels_of, (at, held))
  total = 0
  for g, levels in enumerate(found):
    logits = x[g] @ held_outer["gate"]["kernel"]
    thresholds = np.exp(outer["log_thresholds"])
    total += reference_losses.threshold_loss(
      logits, thresholds, levels.primary.edges, mask[g]
    )
    for i, tokens in enumerate(levels.sent):
      logits = x[g][tokens] @ held_inner["gate"]["kernel"][i]
      thresholds = np.exp(inner["log_thresholds"][i])
      edges = levels.secondary[i].edges
      total += reference_losses.threshold_loss(logits, thresholds, edges)
  return total


def losses_in_loops(case, at, found):
  importance = reference_losses.two_level_importance(found)
  load = reference_losses.two_level_load(found)
  values = {
    "importance": reference_losses.cv_squared(importance),
    "load": reference_losses.cv_squared(load),
  }
  if "threshold" in case.weights:
    values["threshold"] = threshold_loss(case, at, found)
  return values


@ALL
def test_is_the_mixture_of_eq_12(name):
  (_, (y, _, _)), _ = run(CASES[name])
  want, _, _ = expected(CASES[name])
  near(y, want)
  if CASES[name].masked:
    assert (np.asarray(y)[~np.asarray(MASK)] == 0).all()


@ALL
def test_importance_and_load_are_eq_13_and_14(name):
  case = CASES[name]
  (_, (_, routing, values)), _ = run(case)
  _, found, _ = expected(case)
  importance = reference_losses.two_level_importance(found)
  close(routing.importance.sum(axis=0), importance)
  by_hand = losses_in_loops(case, kinds.in_float64(arguments(case)), found)
  assert values.keys() == by_hand.keys()
  jax.tree.map(close, values, by_hand)
  each = [
    reference_losses.cv_squared(reference_losses.two_level_load([h]))
    for h in found
  ]
  close(losses.load(routing, "group"), np.mean(each))


@ALL
def test_reports_what_each_level_dropped(name):
  (_, (_, routing, _)), _ = run(CASES[name])
  _, found, _ = expected(CASES[name])
  primary = np.stack([levels.primary.count for levels in found])
  sent = np.array([list(map(len, levels.sent)) for levels in found])
  count = np.array([[d.count for d in levels.secondary] for levels in found])
  slots = np.stack([levels.slots.sum(axis=0) for levels in found])
  arrived = [
    [len(rows_of(routing, i, h)) for i in range(P)] for h in range(len(found))
  ]
  for got, want in (
    (routing.primary.count, primary),
    (routing.primary.dropped, primary - sent),
    (arrived, sent),
    (routing.count, count.reshape(-1, P * Q)),
    (routing.dropped, (count - slots).reshape(-1, P * Q)),
  ):
    np.testing.assert_array_equal(got, want)
  drops = (sent < primary).any(), (slots < count).any()
  none = name in ("drop-free slots", "strict", "strict together")
  assert drops == (2 * (not none and not is_sorted(name),))
  assert (routing.within is not None) == is_sorted(name)


def test_strict_balance_gives_every_expert_the_same():
  """m1 = k |X| / a tokens for each group, m2 = k m1 / b of these (row 25)."""
  (_, (_, routing, values)), _ = run(CASES["strict"])
  for g, tokens in enumerate(np.asarray(MASK).sum(axis=1)):
    m1 = math.floor(K * tokens / P + 0.5)
    assert (routing.primary.count[g] == m1).all()
    assert (routing.count[g] == math.floor(K * m1 / Q + 0.5)).all()
  assert values["load"] < 1e-10


@pytest.mark.parametrize(
  "name", ["training", "evaluation", "strict", "together", "sorted together"]
)
def test_gradient_of_the_whole_layer(name):
  """Task and balance losses, to all weights of both levels and to x."""
  case = CASES[name]
  (score, _), slopes = run(case)
  _, _, noise = expected(case)

  def score_in_loops(flat):
    at = jax.tree.unflatten(tree, list(flat.values()))
    y, found = in_loops(case, at, *noise)
    values = losses_in_loops(case, at, found)
    return (y * OUT).sum() + sum(case.weights[n] * values[n] for n in values)

  leaves, tree = jax.tree.flatten(kinds.in_float64(arguments(case)))
  flat = {str(i): leaf for i, leaf in enumerate(leaves)}
  np.testing.assert_allclose(score, score_in_loops(flat), rtol=1e-4)
  want = reference.gradient(score_in_loops, flat)
  for got, slope in zip(jax.tree.leaves(slopes), want.values(), strict=True):
    np.testing.assert_allclose(got, slope, rtol=2e-3, atol=2e-3)
  for level in (slopes["primary"], slopes["secondary"]["router"]):
    for leaf in jax.tree.leaves(level)[: None if case.train else 1]:
      assert (np.abs(leaf) > 1e-3).any()


def test_how_rows_move_changes_nothing():
  """Nor whether the hidden layers are kept, in value and gradient."""
  other = {"dispatch": ("einsum", "gather"), "recompute": True}
  case = CASES["training"]
  jax.tree.map(close, run(case._replace(**other)), run(case))


def test_sorted_edges_are_those_of_a_flat_mixture():
  """From tokens to all P * Q experts, with the gates of eq. 12."""
  (_, (_, routing, _)), _ = run(CASES["sorted together"])
  _, (levels,), _ = expected(CASES["sorted together"])
  gates, edges = np.zeros((G * S, P * Q)), routing.assignment
  for s, e, gate in zip(
    edges.tokens(G * S)[0], edges.expert[0], edges.gate[0], strict=True
  ):
    if e < P * Q:
      gates[s, e] += gate
    assert (gate > 0) == (e < P * Q)
  want = levels.gates.reshape(gates.shape)
  np.testing.assert_allclose(gates, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["sorted", "sorted thresholds"])
def test_a_popular_expert_takes_all_that_come(name):
  """Every real token comes to it; slots would hold a part of them."""
  case = CASES[name]
  at = jax.tree.map(lambda w: w, arguments(case))
  for level in (at["primary"], at["secondary"]["router"]):
    kernel = jnp.zeros_like(level["gate"]["kernel"])
    level["gate"]["kernel"] = kernel.at[..., 0].set(100)
  at["x"] = jnp.abs(at["x"])
  (_, (y, routing, _)), _ = compiled(case)(at)
  np.testing.assert_array_equal(routing.count[:, 0], MASK.sum(axis=1))
  assert not routing.dropped.any() and not routing.primary.dropped.any()
  own = of_group(kinds.in_float64(at["secondary"]["experts"]), 0)
  expert = reference.feed_forward(own)
  rows = kinds.in_float64(at["x"]).reshape(-1, D)
  want = [expert(0, row) for row in rows] * np.asarray(MASK).reshape(-1, 1)
  near(y.reshape(-1, D), want)


def test_nan_in_padding_stays_there():
  case = CASES["training"]
  x = jnp.where(MASK[..., None], inputs(), jnp.nan)
  got = compiled(case)({**params(), "x": x})
  jax.tree.map(np.testing.assert_array_equal, got, run(case))
  assert (np.asarray(got[1]["x"])[~np.asarray(MASK)] == 0).all()


def test_a_group_that_nobody_visits_learns_nothing():
  at = jax.tree.map(lambda w: w, params())
  kernel = at["primary"]["gate"]["kernel"]
  at["primary"]["gate"]["kernel"] = kernel.at[:, 1].set(-100)
  x = 1 + jnp.abs(inputs())
  (_, (_, routing, _)), slopes = compiled(CASES["training"])({**at, "x": x})
  assert routing.primary.count[:, 1].sum() == 0
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
  for leaf in jax.tree.leaves(slopes["secondary"]):
    assert (leaf[1] == 0).all() and (leaf[0] != 0).any()
