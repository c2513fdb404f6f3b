"""One contract for every dispatcher, gate and kind of experts."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import gatings
import jax
import jax.numpy as jnp
import kinds
import layers
import numpy as np
import pytest
import reference

from moejax import dispatch, experts, router

G, D = 2, 2
# Dispatchers that cannot run experts that need slots.
WITHOUT_SLOTS = ("ragged",)


class Setting(NamedTuple):
  """What decides the shapes of a mixture.

  Attributes:
    tokens: S.
    num_experts: E.
    k: experts per token.
    capacity: slots per expert and group.
    dtype: of the activations.
  """

  tokens: int = 4
  num_experts: int = 3
  k: int = 2
  capacity: int | None = None
  dtype: Any = jnp.float32


SETTINGS = {
  "capacity 1": Setting(capacity=1),
  "k = E": Setting(k=3),
  "k = 1": Setting(k=1),
  "one expert": Setting(num_experts=1, k=1),
  "one token": Setting(tokens=1),
  "bfloat16": Setting(dtype=jnp.bfloat16),
}


def fits(dispatcher, kind):
  return dispatcher not in WITHOUT_SLOTS or not kinds.case(kind).slots_only


# Every dispatcher with every gate, and with every kind of experts.
OF_KINDS = [
  (dispatcher, "top_k", kind)
  for dispatcher in dispatch.DISPATCH
  for kind in experts.EXPERTS
]
FIT = [each for each in OF_KINDS if fits(each[0], each[2])]
REFUSED = [each for each in OF_KINDS if each not in FIT]
COMBINATIONS = FIT + [
  (dispatcher, gate, "feed_forward")
  for dispatcher in dispatch.DISPATCH
  for gate in gatings.CASES
  if gate != "top_k"
]


def covering():
  """Few combinations, in which each of the three takes part once or more."""
  found = []
  tables = dispatch.DISPATCH, gatings.CASES, experts.EXPERTS
  for i in range(max(map(len, tables))):
    dispatcher, gate, kind = (list(t)[i % len(t)] for t in tables)
    if not fits(dispatcher, kind):
      dispatcher = next(name for name in tables[0] if fits(name, kind))
    found.append((dispatcher, gate, kind))
  return found


class Layer(nn.Module):
  """A mixture without what MoE adds: any capacity, and edges changed by hand.

  Attributes:
    dispatcher: a name in DISPATCH.
    gate: a name in gatings.CASES.
    experts: the module.
    setting: the shapes.
  """

  dispatcher: str
  gate: str
  experts: nn.Module
  setting: Setting

  def __call__(self, x, logits, noise_std, mask, edit):
    """`edit` says where edges lead; -1 where the gate says it."""
    gate = gatings.CASES[self.gate].run
    routing = gate(logits, noise_std, mask, self.setting.k)
    assignment = routing.assignment
    expert = jnp.where(edit < 0, assignment.expert, edit)
    y = dispatch.DISPATCH[self.dispatcher](
      self.experts.run,
      self.experts(x.shape[-1]),
      x,
      assignment._replace(expert=expert),
      self.setting.num_experts,
      self.setting.capacity,
    )
    return y, routing


class Inputs(NamedTuple):
  """All that a layer reads, and what multiplies y in the score."""

  at: dict[str, Any]
  noise_std: jax.Array
  mask: jax.Array
  edit: jax.Array
  out: jax.Array


def draw(combination, setting, seed=3):
  """Draws inputs, some of them padding."""
  _, gate, kind = combination
  S, E, k = setting[:3]
  random = np.random.default_rng(seed)
  logits, noise_std, mask = gatings.draw(seed, True, (G, S, E))
  x, out = random.normal(size=(2, G, S, D))
  at = {
    "x": jnp.asarray(x, setting.dtype),
    "logits": logits,
    "experts": kinds.draw(kinds.case(kind).make(E), E, D),
  }
  edges = gatings.num_edges(gate, S, E, k)
  return Inputs(
    at,
    noise_std,
    mask.at[:, 0].set(True),
    jnp.full((G, edges), -1, jnp.int32),
    jnp.asarray(out, setting.dtype),
  )


@functools.cache
def compiled(combination, setting):
  """Inputs -> y, what was decided, and the gradient of sum(y * out)."""
  dispatcher, gate, kind = combination
  module = kinds.case(kind).make(setting.num_experts)
  layer = Layer(dispatcher, gate, module, setting)

  def score(at, noise_std, mask, edit, out):
    variables = {"params": {"experts": at["experts"]}}
    y, routing = layer.apply(
      variables, at["x"], at["logits"], noise_std, mask, edit
    )
    return (y * out).sum(), (y, routing)

  return jax.jit(jax.value_and_grad(score, has_aux=True))


def run(combination, setting, inputs):
  (_, (y, routing)), slopes = compiled(combination, setting)(*inputs)
  return y, routing, slopes


def expected(combination, setting, inputs, routing):
  """at -> y and the decisions, by the loops."""
  _, gate, kind = combination
  S, E, k, capacity, _ = setting
  noise = gatings.noise_of(routing, inputs.at["logits"], inputs.noise_std)
  noise_std, mask, edit = map(np.asarray, inputs[1:4])
  token = np.asarray(routing.assignment.tokens(S))
  # Where edges led before they were changed.
  led = np.asarray(routing.assignment.expert)

  def edges(g, decision):
    if (edit < 0).all():
      return decision.edges
    return [
      (int(s), new, decision.gates[s, old])
      for s, old, new in zip(token[g], led[g], edit[g], strict=True)
      if new < E
    ]

  def loops(at):
    found = gatings.decide(gate, at["logits"], noise, noise_std, mask, k)
    expert = kinds.case(kind).loops(at["experts"], E)
    y = [
      reference.dispatch(at["x"][g], edges(g, decision), expert, capacity)
      for g, decision in enumerate(found)
    ]
    return np.stack(y), found

  return loops


def agree(combination, setting, inputs):
  """Whether value and gradient are those of the loops."""
  y, routing, slopes = run(combination, setting, inputs)
  loops = expected(combination, setting, inputs, routing)
  at = kinds.in_float64(inputs.at)
  want, found = loops(at)
  gatings.agree(routing, found)
  out = np.asarray(inputs.out, np.float64)
  exact = setting.dtype == jnp.float32
  scale = np.abs(want).max() + 1e-3
  np.testing.assert_allclose(
    y.astype(jnp.float32), want, atol=(1e-4 if exact else 0.03) * scale
  )
  assert y.dtype == slopes["x"].dtype == setting.dtype
  want = kinds.finite_differences(lambda at: (loops(at)[0] * out).sum(), at)
  tolerance = {} if exact else {"rtol": 0.05, "atol": 0.2}
  # What all gates have in common cancels, but not to the last bit.
  kinds.same_gradient(
    slopes.pop("logits"), want.pop("logits"), exact=False, **tolerance
  )
  kinds.same_gradient(slopes, want, **tolerance)
  return y, routing, slopes


def whole_layers():
  """Every router, every kind of experts, and every dispatcher with some."""
  names = list(dispatch.DISPATCH)
  found = [
    (names[i % len(names)], name, "feed_forward")
    for i, name in enumerate(router.ROUTERS)
  ]
  for dispatcher, _, kind in covering():
    if (dispatcher, "top_k", kind) not in found:
      found.append((dispatcher, "top_k", kind))
  return found


def nobody_visits_the_first(token, expert, num_experts):
  return np.where(expert == 0, num_experts, expert)


def all_visit_the_last(token, expert, num_experts):
  """Each token once, and no other expert."""
  changed, seen = np.full_like(expert, num_experts), set()
  for g, a in np.ndindex(expert.shape):
    if expert[g, a] < num_experts and (g, token[g, a]) not in seen:
      seen.add((g, token[g, a]))
      changed[g, a] = num_experts - 1
  return changed


class TestContract:
  """What each dispatch, gating and kind of experts must do with any other.

  y and its gradient, to x, to the logits and to the experts' weights, are those
  of the paper's loops; and what changes nothing has a gradient of exactly zero.
  """

  @pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
  def test_some_padding(self, combination):
    agree(combination, Setting(), draw(combination, Setting()))

  @pytest.mark.parametrize("combination", covering(), ids="-".join)
  def test_padding_everywhere(self, combination):
    inputs = draw(combination, Setting())
    inputs = inputs._replace(mask=jnp.zeros_like(inputs.mask))
    y, _, slopes = agree(combination, Setting(), inputs)
    for array in jax.tree.leaves((y, slopes)):
      assert (np.asarray(array) == 0).all()

  @pytest.mark.parametrize(
    "edit", [nobody_visits_the_first, all_visit_the_last]
  )
  @pytest.mark.parametrize("combination", FIT, ids="-".join)
  def test_experts_without_tokens(self, combination, edit):
    """Their gradient is exactly zero."""
    setting = Setting()
    inputs = draw(combination, setting)
    _, routing, _ = run(combination, setting, inputs)
    edited = edit(
      np.asarray(routing.assignment.tokens(setting.tokens)),
      np.asarray(routing.assignment.expert),
      setting.num_experts,
    )
    assert (edited != 0).all() and (edited < setting.num_experts).any()
    _, _, slopes = agree(
      combination, setting, inputs._replace(edit=jnp.asarray(edited))
    )
    for path, slope in jax.tree_util.tree_leaves_with_path(slopes["experts"]):
      # Of mixed experts the first is among the first kind.
      if path[0].key != "kinds_1":
        assert (np.asarray(slope)[0] == 0).all()

  @pytest.mark.parametrize("combination", covering(), ids="-".join)
  @pytest.mark.parametrize("name", SETTINGS)
  def test_setting(self, name, combination):
    setting = SETTINGS[name]
    if combination[1] == "gshard_top_2" and setting.num_experts == 1:
      with pytest.raises(ValueError, match="needs 2 experts"):
        agree(combination, setting, draw(combination, setting))
    else:
      agree(combination, setting, draw(combination, setting))

  @pytest.mark.parametrize("combination", REFUSED, ids="-".join)
  def test_what_needs_slots_says_so(self, combination):
    with pytest.raises(ValueError, match="need slots"):
      run(combination, Setting(), draw(combination, Setting()))

  @pytest.mark.parametrize("combination", whole_layers(), ids="-".join)
  def test_the_whole_layer(self, combination):
    """In training, with drops: y, and its gradient to every weight and x."""
    _, name, kind = combination
    layer, at = layers.make(*combination)
    y, routing, slopes = layers.run(layer, at)
    at = kinds.in_float64(at)
    decide = layers.decided(name, at, routing)
    out, slots = layers.OUT, layers.SLOTS

    def loops(at):
      expert = kinds.case(kind).loops(at["experts"], layers.E)
      return np.stack(
        [
          reference.dispatch(at["x"][g], decision.edges, expert, slots)
          for g, decision in enumerate(decide(at))
        ]
      )

    np.testing.assert_allclose(y, loops(at), rtol=1e-4, atol=1e-4)
    counts = np.array([decision.count for decision in decide(at)])
    dropped = np.maximum(counts - slots, 0)
    np.testing.assert_array_equal(routing.dropped, dropped)
    assert dropped.sum() > 0 and (
      kind == "feed_forward" or dropped[:, -1].all()
    )
    want = kinds.finite_differences(lambda at: (loops(at) * out).sum(), at)
    kinds.same_gradient(slopes, want, rtol=2e-3, atol=2e-3, exact=False)
