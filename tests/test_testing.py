"""Contracts: ours keep them, and what is wrong in one way is found by them."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import kinds
import pytest

import moejax
from moejax import dispatch, gating, losses, router, testing

pytestmark = pytest.mark.usefixtures("few_sizes")

E, K, S = 5, 2, testing.S


def make(name):
  fixed = ("softmax", "switch", "gshard_top_2")
  return router.ROUTERS[name](E, *(() if name in fixed else (K,)))


ROUTERS = {name: make(name) for name in router.ROUTERS} | {
  "balanced batch": router.Balanced(E, K, over="batch"),
  "balanced quantile": router.Balanced(E, K, learned_by="quantile"),
  "sigmoid quantile": router.Sigmoid(E, K, learned_by="quantile"),
  "in groups": router.Sigmoid(6, 3, num_groups=3, max_groups=2, scale=2.5),
}


@pytest.mark.parametrize("name", ROUTERS)
class TestRouters(testing.RouterContract):
  @pytest.fixture(autouse=True)
  def choose(self, name):
    self.router = ROUTERS[name]


@pytest.mark.parametrize("kind", kinds.VARIANTS)
class TestExperts(testing.ExpertsContract):
  @pytest.fixture(autouse=True)
  def choose(self, kind):
    self.experts = kinds.case(kind).make(3)
    self.sorted_rows = not kinds.case(kind).slots_only


@pytest.mark.parametrize("name", dispatch.DISPATCH)
class TestDispatches(testing.DispatchContract):
  @pytest.fixture(autouse=True)
  def choose(self, name):
    self.dispatch = dispatch.DISPATCH[name]


@pytest.mark.parametrize("name", losses.LOSSES)
class TestLosses(testing.LossContract):
  @pytest.fixture(autouse=True)
  def choose(self, name):
    self.loss = losses.LOSSES[name]
    self.at_balance = float(name == "switch_balance")
    if name == "quantile":
      # The target of a bias moves with it, which no difference would hold.
      k = jnp.full(testing.E, 2, jnp.int32)
      self.loss = lambda found: losses.quantile(found._replace(k=k, bias=None))
      # Thresholds are 0.2, midway between the chances 0.3 and 0.15 is 0.225.
      self.at_balance = testing.E * 0.025**2 / 2


# -- wrong in one way each ----------------------------------------------------


class Wrong(moejax.TopK):
  """Top-2 gating, of which `change` spoils something."""

  change: Callable | None = None

  def decide(self, x, train, mask, ids):
    return self.change(self.logits(x), x, train, mask)


def spoil(**change):
  """Top-2 gating with other fields of the decision or of its edges."""

  def gate(logits, x, train, mask):
    found = gating.top_k(logits, K, mask)
    every = gating.top_k(logits, K)
    got = {name: fn(found, every) for name, fn in change.items()}
    edges = {name: got.pop(name) for name in ("expert", "gate") if name in got}
    return found._replace(**got, assignment=found.assignment._replace(**edges))

  return gate


def first_twice(found, _):
  first, _ = jnp.split(found.assignment.expert, 2, axis=1)
  return jnp.concatenate([first, first], axis=1)


def of_logits(change):
  return lambda logits, x, train, mask: gating.top_k(
    change(logits, x, mask), K, mask
  )


def more_in_training(logits, x, train, mask):
  return gating.noisy_top_k(
    logits, jnp.ones_like(logits), K, jax.random.key(train), mask
  )


class OtherParameters(moejax.TopK):
  """Has a bias in training alone."""

  def decide(self, x, train, mask, ids):
    bias = self.vector(x, "bias", 0.0)[None, None] if train else 0
    return gating.top_k(self.logits(x) + bias, K, mask)


class WrongExperts(moejax.FeedForward):
  """Feed-forward experts, of which `change` spoils something."""

  change: str = ""

  @nn.nowrap
  def run(self, weights, rows, mask=None, train=False, *, group_sizes=None):
    if self.change == "see each other" and rows.ndim == 3:
      rows = rows - rows.mean(axis=1, keepdims=True)
    if self.change == "norm of zeros":
      rows = rows / jnp.sqrt((rows**2).sum(axis=-1, keepdims=True))
    if self.change == "share weights":
      weights = jax.tree.map(lambda w: w + w.mean(axis=0)[None], weights)
    if self.change == "other when sorted" and rows.ndim == 2:
      rows = -rows
    if self.change == "always float32":
      rows = rows.astype(jnp.float32)
    y = super().run(weights, rows, mask, train, group_sizes=group_sizes)
    if self.change == "half the gradient":
      y = (y + jax.lax.stop_gradient(y)) / 2
    return y


def by_gather(change):
  """Dispatch with other edges."""

  def run(expert_fn, weights, x, edges, num_experts, capacity):
    edges = change(edges._replace(token=edges.tokens(x.shape[1])))
    return dispatch.DISPATCH["gather"](
      expert_fn, weights, x, edges, num_experts, capacity
    )

  return run


def squared_norm(found):
  return jax.nn.logsumexp(found.logits, axis=-1) ** 2


# (what is wrong, the test that finds it, what it tests) of each contract.
WRONG = {
  testing.RouterContract: (
    (
      "softmax over tokens",
      "test_other_tokens",
      of_logits(lambda logits, x, mask: jax.nn.softmax(logits, axis=1)),
    ),
    (
      "expert choice called causal",
      "test_other_tokens",
      lambda logits, x, train, mask: gating.expert_choice(logits, K, mask),
    ),
    (
      "depends on the place",
      "test_order",
      of_logits(lambda logits, x, mask: logits + jnp.eye(*x.shape[1:])[None]),
    ),
    (
      "padding routed",
      "test_edges",
      spoil(expert=lambda found, every: every.assignment.expert),
    ),
    (
      "padding counted",
      "test_sums",
      spoil(count=lambda found, every: every.count),
    ),
    (
      "padding in the load",
      "test_sums",
      spoil(load=lambda found, every: every.load),
    ),
    ("a token twice", "test_edges", spoil(expert=first_twice)),
    (
      "out of range",
      "test_edges",
      spoil(expert=lambda found, every: found.assignment.expert + 1),
    ),
    (
      "gates of unused edges",
      "test_edges",
      spoil(gate=lambda found, every: every.assignment.gate),
    ),
    (
      "mean importance",
      "test_sums",
      spoil(importance=lambda found, every: found.importance / S),
    ),
    (
      "gates in bfloat16",
      "test_sums",
      of_logits(lambda logits, x, mask: logits.astype(x.dtype)),
    ),
    (
      "padding in the mean",
      "test_padding",
      of_logits(lambda logits, x, mask: logits * x.mean()),
    ),
    (
      "gates held fixed",
      "test_gradient",
      of_logits(lambda logits, x, mask: jax.lax.stop_gradient(logits)),
    ),
    (
      "a gradient of 0/0",
      "test_gradient",
      of_logits(
        lambda logits, x, mask: (
          logits / (1 + jnp.sqrt(jnp.var(logits, axis=-1, keepdims=True)))
        )
      ),
    ),
    (
      "twice the gradient",
      "test_gradient",
      of_logits(
        lambda logits, x, mask: 2 * logits - jax.lax.stop_gradient(logits)
      ),
    ),
    (
      "needs a mask",
      "test_jit",
      of_logits(lambda logits, x, mask: jnp.where(mask[..., None], logits, 0)),
    ),
    (
      "another without jit",
      "test_jit",
      of_logits(
        lambda logits, x, mask: (
          -logits if isinstance(x, jax.core.Tracer) else logits
        )
      ),
    ),
    ("other parameters in training", "test_parameters", None),
  ),
  testing.ExpertsContract: (
    ("see each other", "test_rows", None),
    ("always float32", "test_rows", None),
    ("share weights", "test_weights", None),
    ("norm of zeros", "test_weights", None),
    ("other when sorted", "test_sorted_rows", None),
    ("half the gradient", "test_gradient", None),
  ),
  testing.DispatchContract: (
    (
      "the last edges first",
      "test_value_and_gradient",
      by_gather(lambda edges: jax.tree.map(lambda a: a[:, ::-1], edges)),
    ),
    (
      "no gates",
      "test_value_and_gradient",
      by_gather(lambda edges: edges._replace(gate=jnp.ones_like(edges.gate))),
    ),
    (
      "gates held fixed",
      "test_value_and_gradient",
      by_gather(
        lambda edges: edges._replace(gate=jax.lax.stop_gradient(edges.gate))
      ),
    ),
  ),
  testing.LossContract: (
    (
      "0/0 at balance",
      "test_balance",
      lambda found: (
        (jnp.std(found.importance.sum(axis=0)) / found.importance.sum()) ** 2
      ),
    ),
    ("another value at balance", "test_balance", losses.switch_balance),
    (
      "mean of groups",
      "test_groups",
      lambda found: losses.importance(found, "group"),
    ),
    (
      "padding counted",
      "test_padding",
      lambda found: squared_norm(found).sum(),
    ),
    (
      "padding in the number",
      "test_padding",
      lambda found: jnp.where(
        jnp.bool(True) if found.mask is None else found.mask,
        squared_norm(found),
        0,
      ).mean(),
    ),
    ("the first token", "test_order", lambda found: squared_norm(found)[0, 0]),
    (
      "no gradient",
      "test_gradient",
      lambda found: losses.importance(jax.lax.stop_gradient(found)),
    ),
    (
      "twice the gradient",
      "test_gradient",
      lambda found: (
        2 * losses.z(found) - jax.lax.stop_gradient(losses.z(found))
      ),
    ),
  ),
}


def subject(contract, name, wrong):
  if contract is testing.RouterContract:
    return "router", Wrong(E, K, wrong) if wrong else OtherParameters(E, K)
  if contract is testing.ExpertsContract:
    return "experts", WrongExperts(3, 4, change=name)
  return {
    testing.DispatchContract: "dispatch",
    testing.LossContract: "loss",
  }[contract], staticmethod(wrong)


@pytest.mark.parametrize(
  "contract, name, test, wrong",
  [(contract, *row) for contract, rows in WRONG.items() for row in rows],
  ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_is_wrong_is_found(contract, name, test, wrong):
  members = dict([subject(contract, name, wrong)])
  with pytest.raises((AssertionError, TypeError)):
    getattr(type("Test", (contract,), members)(), test)()
