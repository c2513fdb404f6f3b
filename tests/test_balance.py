"""What `losses.balance` reports, and both ends of its scale and the losses'."""

import itertools

import decisions
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import reference_losses
from decisions import CASES, G, K, P, Q

from moejax import gating, losses


def want_report(r):
  """Table 6 and the rest, in loops."""
  load, count = r.load.sum(axis=0), r.count.sum(axis=0)
  if r.primary is not None:
    load = reference_losses.hierarchical_load(
      r.primary.load.sum(axis=0),
      load.reshape(P, Q),
      (r.primary.count - r.primary.dropped).sum(axis=0),
    )
  entropies = []
  for level, mixtures in decisions.levels(r):
    groups = decisions.tokens(level, mixtures)
    logits = np.concatenate([v for group in groups for v in group])
    entropies.append(np.mean([reference_losses.entropy(v) for v in logits]))
  return {
    "cv_importance": np.sqrt(
      reference_losses.cv_squared(r.importance.sum(axis=0))
    ),
    "cv_load": np.sqrt(reference_losses.cv_squared(load)),
    "max_over_mean_load": max(load) / (sum(load) / len(load)),
    "max_over_mean_count": max(count) / (sum(count) / len(count)),
    "unused_experts": sum(1 for c in count if c == 0),
    "entropy": sum(entropies),
  }


@pytest.mark.parametrize("case", CASES)
def test_balance_reports_what_table_6_does_and_more(case):
  """The mean over layers, of which each is counted once."""
  decision = CASES[case]
  decision = decision._replace(count=decision.count.at[:, 1].set(0))
  other = decision._replace(importance=decision.importance**2)
  got = losses.balance({"a": (decision,), "b": (other,)})
  first = want_report(decisions.as_numpy(decision))
  second = want_report(decisions.as_numpy(other))
  assert first["unused_experts"] == 1
  drops = {f"dropped_{part}fraction" for part in ("", "first_", "later_")}
  assert set(got) == set(first) | drops
  assert {value.dtype for value in got.values()} == {jnp.dtype("float32")}
  for name in first:
    want = (first[name] + second[name]) / 2
    np.testing.assert_allclose(got[name], want, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_balance_of_nothing_but_padding_is_finite(case):
  assert losses.balance({}) == {}
  got = losses.balance(decisions.hide(CASES[case]))
  assert all(np.isfinite(value) for value in got.values())
  assert got["dropped_fraction"] == got["entropy"] == 0


# -- drops --------------------------------------------------------------------


def choose(random, tokens, experts, capacity):
  """K edges of each token: (its token, expert, whether it fits, first)."""
  best = random.random((len(tokens), experts)).argsort(axis=1)
  chosen = [(tokens[i], e) for k in range(K) for i, e in enumerate(best[:, k])]
  slots = reference.has_slot([(s, e, 0.0) for s, e in chosen], capacity)
  return [
    (s, e, fits, i < len(tokens))
    for i, ((s, e), fits) in enumerate(zip(chosen, slots, strict=True))
  ]


def count(edges_of, experts):
  """The counts of a level, from the edges of each of its mixtures."""
  names = ("count", "dropped", "dropped_first")
  counts = {
    n: np.zeros((1, len(edges_of) * experts), np.float32) for n in names
  }
  for p, edges in enumerate(edges_of):
    for _, e, fits, first in edges:
      at = (0, p * experts + e)
      counts["count"][at] += 1
      counts["dropped"][at] += not fits
      counts["dropped_first"][at] += first and not fits
  return jax.tree.map(jnp.asarray, counts)


def test_drops_of_a_hierarchy_are_those_of_its_leaves():
  """Tokens choose groups, then experts there; what is lost, one by one."""
  random = np.random.default_rng(0)
  primary = choose(random, range(20), P, capacity=6)
  secondary = []
  for p in range(P):
    tokens = [s for s, e, fits, _ in primary if e == p and fits]
    secondary.append(choose(random, tokens, 3, capacity=4))
  computed = 0
  lost = {True: 0, False: 0}  # at first choices, at later ones
  for _, _, fits, first in primary:
    lost[first] += 0 if fits else K
  for _, _, fits, first in itertools.chain(*secondary):
    computed += fits
    lost[first] += not fits
  leaves = 20 * K * K
  assert computed + lost[True] + lost[False] == leaves
  assert lost[True] and lost[False]
  above = decisions.make_level(0, 1, P, (1, P))._replace(**count([primary], P))
  below = decisions.make_level(0, P, 3, (1, P * 3))
  below = below._replace(**count(secondary, 3))
  got = losses.balance(decisions.within(below, above))
  want = {
    "dropped_fraction": leaves - computed,
    "dropped_first_fraction": lost[True],
    "dropped_later_fraction": lost[False],
  }
  for name, edges in want.items():
    np.testing.assert_allclose(got[name], edges / leaves, rtol=1e-5)


# -- ends of the scale --------------------------------------------------------


def one_choice(row, rows, turn):
  """Top-1 gating of tokens with the same logits, each turned on, or not."""
  logits = np.stack([np.roll(row, s * turn) for s in range(2 * len(row))])
  logits = np.broadcast_to(logits, (rows, *logits.shape))
  return gating.top_k(jnp.asarray(logits, jnp.float32), 1)


def flat(turn):
  return one_choice([9, 0, 0], G, turn)


def hierarchy(turn):
  """Every token reaches one group of experts, and one expert there."""
  primary = one_choice([9, 0, 0], G, turn)
  secondary = one_choice([9, 0], P * G, turn)
  reached = primary.count.T.reshape(-1, 1)  # by the rows below
  share = secondary.count / secondary.logits.shape[1]
  leaves = (share * reached).reshape(P, G, Q).swapaxes(0, 1).reshape(G, -1)
  mask = jnp.broadcast_to(reached > 0, secondary.logits.shape[:2])
  secondary = secondary._replace(
    importance=leaves, load=leaves, count=leaves, mask=mask
  )
  return decisions.within(secondary, primary)


@pytest.mark.parametrize("scope", losses.SCOPES)
@pytest.mark.parametrize("make, least", [(flat, 1), (hierarchy, 2)])
def test_perfect_balance(make, least, scope):
  even = make(turn=1)
  assert losses.importance(even, scope) == 0
  assert losses.load(even, scope) < 1e-12
  np.testing.assert_allclose(losses.switch_balance(even, scope), least, 1e-6)
  report = losses.balance(even)
  assert report["max_over_mean_count"] == 1
  assert report["unused_experts"] == report["cv_importance"] == 0


@pytest.mark.parametrize("scope", losses.SCOPES)
@pytest.mark.parametrize(
  "make, experts, most", [(flat, 3, 3), (hierarchy, P * Q, P + Q)]
)
def test_collapse(make, experts, most, scope):
  """All tokens to one expert, all but certainly."""
  collapsed = make(turn=0)
  highest = {"importance": experts - 1, "load": experts - 1}
  for name, value in highest.items():
    got = losses.LOSSES[name](collapsed, scope)
    np.testing.assert_allclose(got, value, rtol=1e-6)
  got = losses.switch_balance(collapsed, scope)
  np.testing.assert_allclose(got, most, rtol=1e-3)
  report = losses.balance(collapsed)
  assert report["unused_experts"] == experts - 1
  np.testing.assert_allclose(report["max_over_mean_count"], experts, 1e-6)
  assert 0 < report["entropy"] < 0.01
