"""One contract for every dispatcher, gate and kind of experts."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import gatings
import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
import reference

from moejax import dispatch, experts, losses, moe, router
from moejax import slots as slots_lib

pytestmark = pytest.mark.usefixtures("few_sizes")

G, D = 2, 2


class Setting(NamedTuple):
  """What decides the shapes of a mixture, and the type of its activations."""

  tokens: int = 4
  num_experts: int = 3
  k: int = 2
  capacity: int | None = None
  dtype: Any = jnp.float32


USUAL = Setting()
SETTINGS = {
  "capacity 1": Setting(capacity=1),
  "k = E": Setting(k=3),
  "k = 1": Setting(k=1),
  "one expert": Setting(num_experts=1, k=1),
  "one token": Setting(tokens=1),
  "bfloat16": Setting(dtype=jnp.bfloat16),
}


def fits(dispatcher, kind):
  return dispatcher != "ragged" or not kinds.VARIANTS[kind].slots_only


# Every kind of experts in slots and on sorted rows. By products rows move as by
# index, whatever becomes of them.
OF_KINDS = [
  (dispatcher, "top_k", kind)
  for dispatcher, some in (
    ("gather", kinds.VARIANTS),
    ("ragged", kinds.VARIANTS),
    ("einsum", ("feed_forward", "each")),
  )
  for kind in some
]
FIT = [each for each in OF_KINDS if fits(each[0], each[2])]
REFUSED = [each for each in OF_KINDS if each not in FIT]


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


COVERING = covering()
# Every setting has a quarter of these, of different dispatchers.
IN_SETTINGS = [
  (name, combination)
  for i, name in enumerate(SETTINGS)
  for combination in COVERING[i % 4 :: 4]
]


class Layer(nn.Module):
  """A mixture without what MoE adds, and so of any capacity."""

  dispatcher: str
  gate: str
  experts: nn.Module
  setting: Setting

  def __call__(self, x, logits, noise_std, mask):
    _, num_experts, k, capacity, _ = self.setting
    routing = gatings.CASES[self.gate].run(logits, noise_std, mask, k)
    run, weights = self.experts.run, self.experts(x.shape[-1])
    y = dispatch.DISPATCH[self.dispatcher](
      run, weights, x, routing.assignment, num_experts, capacity
    )
    return y, routing


class Inputs(NamedTuple):
  """All that a layer reads, and what multiplies y in the score."""

  at: dict[str, Any]
  noise_std: jax.Array
  mask: jax.Array
  out: jax.Array


def draw(combination, setting):
  """Draws inputs, some of them padding."""
  _, _, kind = combination
  S, E, _, _, dtype = setting
  seed = 3 + sum(map(ord, "".join(combination))) % 7
  random = np.random.default_rng(seed)
  logits, noise_std, mask = gatings.draw(seed, True, (G, S, E))
  both = random.normal(size=(2, G, S, D))
  x, out = (kinds.to_device(values, dtype) for values in both)
  weights = kinds.draw(kinds.case(kind).make(E), E, D)
  at = {"x": x, "logits": logits, "experts": weights}
  return Inputs(at, noise_std, mask.at[:, 0].set(True), out)


@functools.cache
def compiled(combination, setting):
  """Inputs -> y, what was decided, and the gradient of sum(y * out)."""
  dispatcher, gate, kind = combination
  module = kinds.case(kind).make(setting.num_experts)
  layer = Layer(dispatcher, gate, module, setting)

  def score(at, noise_std, mask, out):
    variables = {"params": {"experts": at["experts"]}}
    y, routing = layer.apply(variables, at["x"], at["logits"], noise_std, mask)
    return (y * out).sum(), (y, routing)

  return jax.jit(jax.value_and_grad(score, has_aux=True))


def run(combination, setting, inputs):
  (_, (y, routing)), slopes = compiled(combination, setting)(*inputs)
  return y, routing, slopes


def expected(combination, setting, inputs, routing):
  """at -> y and the decisions, by the loops."""
  _, gate, kind = combination
  _, E, k, capacity, _ = setting
  noise = gatings.noise_of(routing, inputs.at["logits"], inputs.noise_std)
  noise_std, mask = map(np.asarray, inputs[1:3])

  def loops(at):
    found = gatings.decide(gate, at["logits"], noise, noise_std, mask, k)
    expert = kinds.case(kind).loops(at["experts"], E)
    y = [
      reference.dispatch(x, decision.edges, expert, capacity)
      for x, decision in zip(at["x"], found, strict=True)
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


# -- whole layers, with weights off their start and with drops -----------------

# Groups of 8 tokens: in training 4 slots, the least there are.
TOKENS, E, K = 8, 3, 2
FACTORS = {True: 0.5, False: 1.0}
RANDOM = np.random.default_rng(2)
# For the gating that has none of its own: its ids are made of them.
GIVEN = RANDOM.normal(size=(G, TOKENS, E))
# What multiplies y in the score.
OUT = RANDOM.normal(size=(G, TOKENS, D))
MASK = np.arange(TOKENS)[None] != np.array([[2], [TOKENS]])
# What routers do, where it has another name; and in evaluation.
DOES = {"expert_threshold": "threshold"}
EVALUATES = {"noisy_top_k": "top_k", "balanced": "threshold"}


def whole_layers():
  """Every router, every kind of experts, and every dispatcher with some."""
  names = list(dispatch.DISPATCH)
  found = [
    (names[i % len(names)], name, "feed_forward")
    for i, name in enumerate(router.ROUTERS)
  ]
  others = [(dispatcher, "top_k", kind) for dispatcher, _, kind in COVERING]
  return list(dict.fromkeys(found + others))


def make(dispatcher, name, kind):
  """Makes the layer, all its random weights, and x."""
  choose = router.ROUTERS[name]
  has_k = "k" in choose.__dataclass_fields__
  layer = moe.MoE(
    choose(E, **({"k": K} if has_k else {})),
    kinds.case(kind).make(E),
    group_size=TOKENS,
    capacity_factor=FACTORS[True],
    eval_capacity_factor=FACTORS[False],
    dispatch=dispatcher,
  )
  x = 1 + np.random.default_rng(1).normal(size=(G, TOKENS, D))
  ids = jnp.zeros((G, TOKENS), jnp.int32)
  at = {"router": {}, "experts": {}, "x": jnp.asarray(x, jnp.float32)}
  at |= kinds.random_params(layer, at["x"], ids=ids)
  if "gate" in at["router"]:
    # The last expert is wanted by most tokens, and x is mostly positive.
    kernel = at["router"]["gate"]["kernel"]
    at["router"]["gate"]["kernel"] = kernel.at[:, -1].add(2)
  if "bias" in at["router"]:
    at["router"]["bias"] = jnp.asarray(gatings.bias(E))
  if "log_thresholds" in at["router"]:
    at["router"]["log_thresholds"] = jnp.log(gatings.thresholds(E))
  if "average_thresholds" in at["router"]:
    at["router"]["average_thresholds"] = jnp.asarray(gatings.thresholds(E))
  return layer, at


def decided(name, at, routing, train):
  """at -> the decisions of the loops, with the chance that `routing` had."""
  second = np.asarray(routing.assignment.expert)[:, TOKENS:] < E
  gate, k = DOES.get(name, name if train else EVALUATES.get(name, name)), K
  if gate == "threshold":
    k = E  # max_k is 2 k, or all.

  def logits_of(at):
    x, weights = at["x"], at["router"]
    logits = x @ weights["gate"]["kernel"] if "gate" in weights else GIVEN
    noise = x @ weights["noise"]["kernel"] if "noise" in weights else 0 * logits
    return logits, np.logaddexp(0, noise) + 1e-2

  noise = gatings.noise_of(routing, *logits_of(at))

  def decide(at):
    logits, noise_std = logits_of(at)
    if gate == "gshard_top_2" and train:
      args = zip(logits, np.where(second, 0, 2), MASK, strict=True)
      return [reference.gshard_top_2(*each) for each in args]
    return gatings.decide(gate, logits, noise, noise_std, MASK, k)

  return decide


def run_layer(layer, at, train):
  """Returns y, the decision, and, in training, the gradient of sum(y * OUT)."""

  def score(at):
    at = dict(at)
    y, state = layer.apply(
      {"params": at},
      at.pop("x"),
      train=train,
      mask=jnp.asarray(MASK),
      ids=jnp.asarray(gatings.ids(GIVEN)),
      rngs={"router": jax.random.key(4)} if train else {},
      mutable=["routing"],
    )
    return (y * jnp.asarray(OUT, y.dtype)).sum(), (y, state)

  if train:
    fn = jax.jit(jax.value_and_grad(score, has_aux=True))
    (_, (y, state)), slopes = fn(at)
  else:
    (_, (y, state)), slopes = jax.jit(score)(at), None
  (routing,) = losses.routings(state)
  return y, routing, slopes


class TestContract:
  """What each dispatch, gating and kind of experts must do with any other.

  y and its gradient, to x, to the logits and to the experts' weights, are those
  of the paper's loops; and what changes nothing has a gradient of exactly zero.
  """

  @pytest.mark.parametrize(
    "combination", dict.fromkeys(FIT + COVERING), ids="-".join
  )
  def test_some_padding(self, combination):
    agree(combination, USUAL, draw(combination, USUAL))

  @pytest.mark.parametrize("name, combination", IN_SETTINGS)
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
      run(combination, USUAL, draw(combination, USUAL))

  @pytest.mark.parametrize("combination", whole_layers(), ids="-".join)
  def test_the_whole_layer(self, combination):
    """With drops: y, and in training its gradient to every weight and x."""
    _, name, kind = combination
    layer, at = make(*combination)
    every = kinds.in_float64(at)
    for train in (True, False) if kind == "feed_forward" else (True,):
      y, routing, slopes = run_layer(layer, at, train)
      decide = decided(name, every, routing, train)
      edges = routing.assignment.expert.shape[1]
      slots = slots_lib.capacity(edges, TOKENS, E, FACTORS[train])

      def loops(at, decide=decide, slots=slots):
        expert = kinds.case(kind).loops(at["experts"], E)
        found = zip(at["x"], decide(at), strict=True)
        y = [reference.dispatch(x, d.edges, expert, slots) for x, d in found]
        return np.stack(y)

      np.testing.assert_allclose(y, loops(every), rtol=1e-4, atol=1e-4)
      for g, decision in enumerate(decide(every)):
        fits = np.array(reference.has_slot(decision.edges, slots))
        experts_of = np.array([e for _, e, _ in decision.edges])
        np.testing.assert_array_equal(
          routing.dropped[g], np.bincount(experts_of[~fits], minlength=E)
        )
        if routing.assignment.token is None:
          # The first choices of all tokens come before all second ones.
          lost = ~fits[: len({s for s, _, _ in decision.edges})]
          np.testing.assert_array_equal(
            routing.dropped_first[g],
            np.bincount(experts_of[: len(lost)][lost], minlength=E),
          )
      assert routing.dropped.sum() > 0 or not train
      if train:
        want = kinds.finite_differences(
          lambda at: (loops(at) * OUT).sum(), every
        )
        kinds.same_gradient(slopes, want, rtol=2e-3, atol=2e-3, exact=False)
