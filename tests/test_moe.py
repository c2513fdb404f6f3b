"""The whole layer against eq. 1: groups, capacity, padding, options, errors."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
import reference

from moejax import dispatch, experts, losses, moe, router

B, L, D, E, F, K = 2, 8, 3, 4, 5, 2
S = 8
TOKENS = B * L
KEY = jax.random.key(3)
MASK = jnp.asarray(np.arange(TOKENS).reshape(B, L) % 5 > 0)
TOP_K = router.TopK(E, K)
BY_ALL = pytest.mark.parametrize("name", dispatch.DISPATCH)


def layer(gate=None, kind=None, **options):
  options = {"group_size": S, "capacity_factor": None} | options
  gate = gate or router.NoisyTopK(E, K)
  return moe.MoE(gate, kind or experts.FeedForward(E, F), **options)


def inputs(seed=1):
  return jax.random.normal(jax.random.key(seed), (B, L, D))


@functools.cache
def params(skew=0.0, gate=None):
  """Params of `layer`, all random; skew draws tokens to the first expert."""
  drawn = kinds.random_params(layer(gate), inputs())
  kernel = drawn["router"]["gate"]["kernel"]
  drawn["router"]["gate"]["kernel"] = kernel.at[:, 0].add(skew)
  return drawn


@functools.partial(jax.jit, static_argnums=(0, 3))
def apply(module, params, x, train=False, mask=None):
  """Returns y and the routing."""
  y, state = module.apply(
    {"params": params},
    x,
    train=train,
    mask=mask,
    rngs={"router": KEY} if train else {},
    mutable=["routing"],
  )
  (routing,) = losses.routings(state)
  return y, routing


def noise_std(at):
  x = at["x"].reshape(-1, S, D)
  return np.logaddexp(0, x @ at["router"]["noise"]["kernel"]) + 1e-2


def decisions(at, noise=None, mask=None):
  """The reference's decision for each group; noise None is evaluation."""
  logits = at["x"].reshape(-1, S, D) @ at["router"]["gate"]["kernel"]
  groups = range(len(logits))
  masks = [None for _ in groups] if mask is None else mask.reshape(-1, S)
  if noise is None:
    return [reference.top_k(logits[g], K, masks[g]) for g in groups]
  stds = noise_std(at)
  return [
    reference.noisy_top_k(logits[g], noise[g], stds[g], K, masks[g])
    for g in groups
  ]


def expected(at, noise=None, mask=None, capacity=None):
  """The reference's y and its decisions."""
  expert = reference.feed_forward(at["experts"])
  found = decisions(at, noise, mask)
  rows = at["x"].reshape(-1, S, D)
  y = [
    reference.dispatch(rows[g], d.edges, expert, capacity)
    for g, d in enumerate(found)
  ]
  return np.concatenate(y).reshape(B, L, D), found


def recover_noise(at, routing):
  logits = at["x"].reshape(-1, S, D) @ at["router"]["gate"]["kernel"]
  return (np.asarray(routing.logits, np.float64) - logits) / noise_std(at)


@pytest.mark.parametrize("train", [False, True])
@BY_ALL
def test_is_the_mixture_of_eq_1(name, train):
  module = layer(dispatch=name, eval_capacity_factor=None)
  mask = None if train else MASK
  y, routing = apply(module, params(), inputs(), train, mask)
  at = kinds.in_float64({**params(), "x": inputs()})
  noise = recover_noise(at, routing) if train else None
  want, found = expected(at, noise, None if mask is None else np.asarray(mask))
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
  by_sum = [
    reference.mixture(rows, d.gates, reference.feed_forward(at["experts"]))
    for rows, d in zip(at["x"].reshape(-1, S, D), found, strict=True)
  ]
  np.testing.assert_allclose(want.reshape(-1, S, D), by_sum, atol=1e-12)
  assert y.shape == (B, L, D)
  assert (np.asarray(routing.dropped) == 0).all()
  if mask is not None:
    assert (np.asarray(y)[~np.asarray(mask)] == 0).all()


@BY_ALL
def test_training_and_evaluation_have_their_own_capacity(name):
  module = moe.MoE(
    router.TopK(E, K),
    experts.FeedForward(E, F),
    group_size=TOKENS,
    capacity_factor=0.6,
    eval_capacity_factor=1.2,
    dispatch=name,
  )
  at = jax.tree.map(lambda w: w, params(skew=3.0))
  at["router"] = {"gate": at["router"]["gate"]}
  x = jnp.abs(inputs())
  logits = kinds.in_float64(x).reshape(TOKENS, D) @ kinds.in_float64(
    at["router"]["gate"]["kernel"]
  )
  want = reference.top_k(logits, K)
  for train, slots in ((True, 5), (False, 10)):
    y, routing = apply(module, at, x, train)
    dropped = np.maximum(want.count - slots, 0)
    assert dropped.sum() > 0
    np.testing.assert_array_equal(routing.dropped, dropped[None])
    np.testing.assert_array_equal(routing.count, want.count[None])
    fits = reference.has_slot(want.edges, slots)
    assert fits.count(False) == dropped.sum()
    expert = reference.feed_forward(kinds.in_float64(at["experts"]))
    rows = kinds.in_float64(x).reshape(TOKENS, D)
    np.testing.assert_allclose(
      y.reshape(TOKENS, D),
      reference.dispatch(rows, want.edges, expert, slots),
      rtol=1e-4,
      atol=1e-4,
    )


@pytest.mark.parametrize("train", [False, True])
def test_groups_are_routed_each_alone(train):
  """Groups of consecutive tokens with slots of their own."""
  options = {"capacity_factor": 0.5, "eval_capacity_factor": 0.5}
  x = inputs()
  both, routing = apply(layer(**options), params(skew=2.0), x, train)
  alone = layer(**options | {"group_size": L})
  # The first group draws the same noise as it does among others.
  first, only = apply(alone, params(skew=2.0), x[:1], train)
  np.testing.assert_allclose(both[:1], first, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(routing.dropped[:1], only.dropped)
  assert np.asarray(only.dropped).sum() > 0
  if not train:
    second, _ = apply(alone, params(skew=2.0), x[1:], train)
    np.testing.assert_allclose(both[1:], second, rtol=1e-5, atol=1e-6)


@BY_ALL
def test_nan_in_padding_stays_there(name):
  mask = jnp.arange(L)[None] < jnp.array([[L], [1]])
  x = jnp.where(mask[..., None], inputs(), jnp.nan)
  module = layer(dispatch=name)

  def loss(params, x):
    y, _ = module.apply({"params": params}, x, mask=mask, mutable=["routing"])
    return jnp.square(y).sum(), y

  (_, y), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params(), x)
  assert jnp.isfinite(y).all()
  assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
  assert (y[~mask] == 0).all() and (grads[1][~mask] == 0).all()


# -- what is refused -----------------------------------------------------------


@pytest.mark.parametrize(
  "module, message",
  [
    (layer(group_size=5), r"group size 5 .* 16 tokens"),
    (layer(group_size=32), r"group size 32 .* 16 tokens"),
    (layer(group_size=0), "group size 0 "),
    (layer(dispatch="teleport"), r"'teleport'.*einsum.*gather"),
    (
      moe.MoE(router.NoisyTopK(E, K), experts.FeedForward(E + 2, F)),
      rf"\b{E} experts.*\b{E + 2}\b",
    ),
    (
      moe.MoE(router.Single(), experts.FeedForward(2, F)),
      r"\b1 experts.*\b2\b",
    ),
    (layer(eval_capacity_factor=0.0), r"0\.0 .* 4 experts"),
    (
      moe.MoE(router.NoisyTopK(E, E + 1), experts.FeedForward(E, F)),
      rf"k = {E + 1}\b.*\b{E} experts",
    ),
  ],
)
def test_bad_sizes_name_both_numbers(module, message):
  with pytest.raises(ValueError, match=message):
    module.init({"params": KEY}, inputs())


@pytest.mark.parametrize(
  "x, options, message",
  [
    (inputs()[:0], {}, r"\(0, 8, 3\), without a token"),
    (inputs().astype(jnp.complex64), {}, "complex64, which no router reads"),
    (
      inputs(),
      {"mask": jnp.ones((L, B), bool)},
      rf"mask is \({L}, {B}\).*\({B}, {L}\)",
    ),
    (
      inputs(),
      {"ids": jnp.ones((L, B), jnp.int32)},
      rf"ids is \({L}, {B}\).*\({B}, {L}\)",
    ),
  ],
)
def test_bad_inputs_are_named(x, options, message):
  with pytest.raises(ValueError, match=message):
    layer().init(KEY, x, **options)


# -- a single expert -----------------------------------------------------------

SINGLE = moe.MoE(router.Single(), experts.FeedForward(1, F))
RAGGED_MASK = jnp.arange(L)[None] < jnp.array([[L], [1]])


def test_a_single_expert_is_a_mixture_of_one():
  """With its parameters alone, and nothing to report."""
  whole = moe.MoE(
    router.NoisyTopK(1, 1), experts.FeedForward(1, F), group_size=S
  )
  variables = nn.unbox(SINGLE.init({"params": KEY}, inputs()))
  assert list(variables["params"]) == ["experts"]
  gates = {name: {"kernel": jnp.ones((D, 1))} for name in ("gate", "noise")}
  for train in (False, True):
    y, routing = apply(
      whole, {"router": gates, **variables["params"]}, inputs(), train
    )
    got = SINGLE.apply(variables, inputs(), train=train)
    np.testing.assert_allclose(got, y, rtol=1e-5, atol=1e-6)
    # No balance to lose, no token to drop.
    assert losses.importance(routing) == 0 and losses.load(routing) == 0
    assert np.asarray(routing.dropped).sum() == 0
  _, state = SINGLE.apply(variables, inputs(), mutable=["routing"])
  assert losses.balance(state) == {}
  numbers = np.arange(B * L * D).reshape(B, L, D)
  np.testing.assert_array_equal(
    SINGLE.apply(variables, numbers),
    SINGLE.apply(variables, numbers.astype(np.float32)),
  )


def test_padding_of_a_single_expert_gives_zero():
  """In values and gradients, though it be NaN."""
  variables = nn.unbox(SINGLE.init(KEY, inputs()))

  @jax.jit
  @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
  def run(variables, x):
    y = SINGLE.apply(variables, x, mask=RAGGED_MASK)
    return jnp.square(y).sum(), y

  want = run(variables, inputs())
  got = run(variables, jnp.where(RAGGED_MASK[..., None], inputs(), jnp.nan))
  jax.tree.map(np.testing.assert_array_equal, got, want)
  (_, y), (_, to_x) = got
  assert (y[~RAGGED_MASK] == 0).all() and (to_x[~RAGGED_MASK] == 0).all()
  whole = SINGLE.apply(variables, inputs())
  np.testing.assert_allclose(y[RAGGED_MASK], whole[RAGGED_MASK], rtol=1e-6)


class Masked(nn.Module):
  """Adds the number of rows that are real."""

  def __call__(self, rows, mask):
    return rows + mask.sum().astype(rows.dtype)


def test_a_single_expert_is_told_what_is_padding():
  module = moe.MoE(router.Single(), experts.Each(1, Masked()))
  y = module.apply({}, inputs(), mask=RAGGED_MASK)
  want = (inputs() + (L + 1))[RAGGED_MASK]
  np.testing.assert_array_equal(y[RAGGED_MASK], want)


# -- where parameters lie ------------------------------------------------------


def mixture(**name):
  return moe.MoE(router.TopK(E, K), experts.Each(E, nn.Dense(D)), **name)


def two_levels(**name):
  mixed = experts.Mixed((experts.Linear(1), experts.FeedForward(1, F)))
  within = moe.MoE(router.TopK(2, 1), mixed)
  return moe.HierarchicalMoE(router.TopK(2, 1), within, **name)


class Inline(nn.Module):
  """Makes the layers, and what they are made of, where they are used."""

  @nn.compact
  def __call__(self, x):
    return two_levels(name="second")(mixture(name="first")(x))


class InSetup(nn.Module):
  """Makes them in `setup`, the router by itself."""

  def setup(self):
    self.gate = router.TopK(E, K)
    self.first = moe.MoE(self.gate, experts.Each(E, nn.Dense(D)))
    self.second = two_levels()

  def __call__(self, x):
    return self.second(self.first(x))


class Given(nn.Module):
  """Is given the layers."""

  first: nn.Module
  second: nn.Module

  def __call__(self, x):
    return self.second(self.first(x))


def test_parameters_lie_in_the_scope_of_their_layer():
  """However it is made: alone, inline, in `setup`, from outside."""

  def tree(module):
    made = jax.eval_shape(module.init, KEY, inputs())["params"]
    return jax.tree.map(lambda leaf: leaf.shape, nn.unbox(made))

  want = {"first": tree(mixture()), "second": tree(two_levels())}
  assert set(want["first"]) == {"router", "experts"}
  within = want["second"]["secondary"]["experts"]
  assert set(within) == {"kinds_0", "kinds_1"}
  assert tree(Inline()) == want
  assert tree(nn.remat(Inline)()) == want
  assert tree(InSetup()) == want
  assert tree(Given(mixture(), two_levels())) == want


# -- options -------------------------------------------------------------------

X = jnp.abs(inputs())


def test_auto_gives_slots_to_experts_that_need_them():
  """Even as one kind of many; ragged dispatch would refuse them."""
  each, linear = experts.Each(2, nn.Dense(D)), experts.Linear(2)
  for kind in (
    experts.Each(E, nn.Dense(D)),
    experts.Mixed((linear, each)),
    experts.Mixed((linear, experts.Mixed((each,)))),
    # A mixture that is an expert itself.
    experts.Each(E, layer(group_size=None)),
  ):
    module = layer(TOP_K, kind, eval_capacity_factor=None)
    jax.eval_shape(lambda module=module: module.init(KEY, inputs()))


@BY_ALL
def test_recomputing_keeps_no_hidden_layer_and_changes_nothing(name):
  bounded = {"capacity_factor": 0.5, "dispatch": name}
  at = params(2.0, TOP_K)

  def run(recompute, params, x):
    module = layer(TOP_K, recompute=recompute, **bounded)
    return jnp.square(apply(module, params, x, True, MASK)[0]).sum()

  def kept(recompute):
    """Shapes of what the backward pass is given."""
    fn = functools.partial(run, recompute)
    saved = jax.eval_shape(lambda: jax.tree.leaves(jax.vjp(fn, at, X)[1]))
    return [leaf.shape for leaf in saved]

  def hidden(shapes):
    return [s for s in shapes if s[-1:] == (F,) and s != (E, D, F)]

  assert hidden(kept(False)) and not hidden(kept(True))
  slopes = jax.jit(
    lambda *args: [
      jax.value_and_grad(functools.partial(run, recompute), (0, 1))(*args)
      for recompute in (False, True)
    ]
  )
  kept_all, again = slopes(at, X)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, again, kept_all)


def test_dropped_first_are_those_of_first_choices():
  at = params(3.0, TOP_K)
  _, routing = apply(layer(TOP_K, capacity_factor=0.5), at, X, True, MASK)
  dropped = np.asarray(routing.dropped)
  first = np.zeros_like(dropped)
  at = kinds.in_float64({**at, "x": X})
  for g, want in enumerate(decisions(at, None, np.asarray(MASK))):
    # The first choices of all tokens come before all second ones.
    tokens = len({s for s, _, _ in want.edges})
    fits = reference.has_slot(want.edges, 4)
    for (_, e, _), has_slot in zip(want.edges[:tokens], fits, strict=False):
      first[g, e] += not has_slot
  np.testing.assert_array_equal(routing.dropped_first, first)
  assert 0 < first.sum() < dropped.sum()


# -- what comes in ------------------------------------------------------------


def of_numbers(dispatcher):
  """Returns a layer that drops nothing, its variables, and whole numbers."""
  layer = moe.MoE(
    router.TopK(4, k=2),
    experts.FeedForward(4, 8),
    eval_capacity_factor=None,
    dispatch=dispatcher,
  )
  x = np.random.default_rng(0).integers(0, 5, (2, 8, 4))
  return layer, layer.init(jax.random.key(0), jnp.ones(x.shape)), x


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.float64, bool])
def test_numbers_are_promoted_as_a_dense_layer_does(dtype):
  layer, variables, x = of_numbers("auto")
  wanted = layer.apply(variables, jnp.asarray(x.astype(dtype), jnp.float32))
  found = layer.apply(variables, x.astype(dtype))
  assert found.dtype == jnp.float32 and np.abs(found).max() > 0.1
  np.testing.assert_array_equal(found, wanted)


def test_a_large_batch_of_numpy_runs_eagerly():
  """Above the edges from which "auto" sorts rows."""
  layer = of_numbers("auto")[0].clone(group_size=64)
  x = np.ones((48, 64, 4), np.float32)
  mask = np.arange(64)[None] < np.arange(48)[:, None]
  variables = layer.init(jax.random.key(0), x)
  y = layer.apply(variables, x, mask=mask)
  assert (np.abs(y).max(-1) > 0).sum() == mask.sum()


@pytest.mark.parametrize("dispatcher", dispatch.DISPATCH)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_token_that_is_not_finite_spoils_no_other(dispatcher, value):
  layer, variables, x = of_numbers(dispatcher)
  x = jnp.asarray(x, jnp.float32)
  spoilt = x.at[0, 3, 1].set(value)
  sound = np.isfinite(spoilt).all(axis=-1, keepdims=True)

  def total(x):
    y = layer.apply(variables, x)
    return jnp.where(sound, y, 0).sum(), y

  (_, wanted), slope = jax.value_and_grad(total, has_aux=True)(x)
  (_, y), slope_spoilt = jax.value_and_grad(total, has_aux=True)(spoilt)
  assert not np.isfinite(y[0, 3]).any()
  for found, right in ((y, wanted), (slope_spoilt, slope)):
    np.testing.assert_allclose(
      np.where(sound, found, 0), np.where(sound, right, 0), rtol=1e-6
    )


@pytest.mark.parametrize("dispatcher", dispatch.DISPATCH)
def test_derivatives_forward_are_those_of_einsum(dispatcher):
  layer, variables, x = of_numbers(dispatcher)
  x = jnp.asarray(x, jnp.float32)

  def total(x):
    return (layer.apply(variables, x) ** 2).sum()

  direction = jnp.ones_like(x)
  if dispatcher != "einsum":
    with pytest.raises(TypeError, match="no derivative forward .*='einsum'"):
      jax.jvp(total, (x,), (direction,))
    return
  slope = (jax.grad(total)(x) * direction).sum()
  np.testing.assert_allclose(
    jax.jvp(total, (x,), (direction,))[1], slope, rtol=1e-5
  )
  # Forward over reverse, as of Hessians.
  bent = jax.jvp(jax.grad(total), (x,), (direction,))[1]
  assert np.isfinite(bent).all() and np.abs(bent).max() > 0
