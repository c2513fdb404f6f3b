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

pytestmark = pytest.mark.usefixtures("few_sizes")

B, L, D, E, F, K = 2, 8, 3, 4, 5, 2
S = 8
TOKENS = B * L
KEY = jax.random.key(3)
MASK = jnp.asarray(np.arange(TOKENS).reshape(B, L) % 5 > 0)
# One row is all but padding.
RAGGED_MASK = jnp.arange(L)[None] < jnp.array([[L], [1]])
FEED_FORWARD = experts.FeedForward(E, F)
NOISY, TOP_K = router.NoisyTopK(E, K), router.TopK(E, K)
BY_ALL = pytest.mark.parametrize("name", dispatch.DISPATCH)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)


def layer(gate=NOISY, kind=FEED_FORWARD, **options):
  options = {"group_size": S, "capacity_factor": None} | options
  return moe.MoE(gate, kind, **options)


def inputs(seed=1):
  return jax.random.normal(jax.random.key(seed), (B, L, D))


X = jnp.abs(inputs())


def init(module, *args, **options):
  return nn.unbox(jax.jit(module.init)(KEY, *args, **options))


@functools.cache
def params(skew=0.0, gate=NOISY):
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
    rngs={"router": KEY, "dropout": KEY} if train else {},
    mutable=["routing"],
  )
  (routing,) = losses.routings(state)
  return y, routing


@pytest.mark.parametrize("train", [False, True])
def test_groups_are_routed_each_alone(train):
  """Groups of consecutive tokens with slots of their own."""
  options = {"capacity_factor": 0.5, "eval_capacity_factor": 0.5}
  x = inputs()
  both, routing = apply(layer(**options), params(skew=2.0), x, train)
  # The first group draws the same noise as it does among others.
  first, only = apply(layer(**options), params(skew=2.0), x[:1], train)
  close(both[:1], first)
  np.testing.assert_array_equal(routing.dropped[:1], only.dropped)
  assert np.asarray(only.dropped).sum() > 0


@pytest.mark.parametrize("name", [*dispatch.DISPATCH, "single"])
def test_nan_in_padding_stays_there(name):
  """In values and gradients; padding gives zero."""
  module, at = layer(dispatch=name), params()
  if name == "single":
    module, at = SINGLE, init(SINGLE, X)["params"]

  @jax.jit
  @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
  def run(params, x):
    y = module.apply({"params": params}, x, mask=RAGGED_MASK)
    return jnp.square(y).sum(), y

  want = run(at, inputs())
  got = run(at, jnp.where(RAGGED_MASK[..., None], inputs(), jnp.nan))
  jax.tree.map(np.testing.assert_array_equal, got, want)
  (_, y), (_, to_x) = got
  assert (y[~RAGGED_MASK] == 0).all() and (to_x[~RAGGED_MASK] == 0).all()


# -- what training leaves out --------------------------------------------------


@BY_ALL
def test_masked_outputs_are_those_of_some_edges(name):
  """Each token has a sum over a part of its experts, of weight 1 / (1 - p)."""
  chance, x = 0.25, jax.random.normal(KEY, (32, L, D))
  plain = layer(TOP_K, group_size=L, dispatch=name)
  at = params(gate=TOP_K)
  y, routing = apply(plain.clone(masked_outputs=chance), at, x, True)
  whole, same = apply(plain, at, x, True)
  jax.tree.map(np.testing.assert_array_equal, routing, same)
  close(apply(plain.clone(masked_outputs=chance), at, x)[0], whole)
  flat, loops = x.reshape(-1, D), reference.feed_forward(at["experts"])
  chosen = np.asarray(same.assignment.expert.reshape(32, K, L))
  gate = np.asarray(same.assignment.gate.reshape(32, K, L))
  left = []
  for n, row in enumerate(np.asarray(flat, np.float64)):
    of_edges = [
      gate[n // L, k, n % L]
      * loops(chosen[n // L, k, n % L], row)
      / (1 - chance)
      for k in range(K)
    ]
    parts = {
      kept: sum(y for y, one in zip(of_edges, kept, strict=True) if one)
      for kept in np.ndindex(2, 2)
    }
    got = np.asarray(y.reshape(-1, D)[n])
    kept = min(parts, key=lambda kept: np.abs(parts[kept] - got).max())
    np.testing.assert_allclose(got, parts[kept], 1e-4, 1e-5)
    left += kept
  # 512 edges: three standard deviations are 0.057.
  assert abs(np.mean(left) - (1 - chance)) < 0.06


@BY_ALL
def test_dropout_leaves_the_same_hidden_units_to_all_rows_of_an_expert(name):
  """Their number is read from outputs that are sums of powers of two."""
  units, chance = 12, 0.25
  kind = experts.FeedForward(E, units, dropout=chance)
  module = layer(TOP_K, kind, dispatch=name)
  at = params(gate=TOP_K) | {
    "experts": {
      "w_in": jnp.zeros((E, D, units)).at[:, 0].set(1.0),
      "w_out": jnp.zeros((E, units, D))
      .at[:, :, 0]
      .set(2.0 ** np.arange(units)),
    }
  }
  x = X.at[..., 0].set(1 - chance)
  y, routing = apply(module, at, x, True)
  expert, gate = (a.reshape(B, K, L) for a in routing.assignment[:2])
  # Which units an expert has left: y = sum_k gate_k bits_k, solved by all rows.
  of_experts = jax.nn.one_hot(expert, E) * gate[..., None]
  shares = np.float64(of_experts.sum(1).reshape(-1, E))
  bits = np.linalg.lstsq(shares, np.float64(y[..., 0].reshape(-1)))[0]
  whole = np.round(bits).astype(int)
  np.testing.assert_allclose(bits, whole, atol=0.2)
  left = (whole[:, None] >> np.arange(units)) & 1
  assert len({tuple(each) for each in left}) == E
  assert 0.6 < left.mean() < 0.9
  plain = layer(TOP_K, kind.clone(dropout=0.0), dispatch=name)
  close(apply(module, at, x)[0], apply(plain, at, x, True)[0])


def test_leaving_out_is_by_chance():
  for module, message in (
    (layer(masked_outputs=1.0), r"masked_outputs is 1\.0.*at least 0 and less"),
    (
      layer(kind=experts.FeedForward(E, F, dropout=-0.5)),
      r"dropout of experts is -0\.5.*at least 0 and less",
    ),
    (
      layer(kind=experts.FeedForward(E, F, init_scale=0.0)),
      "init_scale is 0.0",
    ),
    (SINGLE.clone(masked_outputs=0.5), r"masked_outputs is 0\.5, .* leave it"),
    (
      moe.HierarchicalMoE(
        router.TopK(2, 1), layer(group_size=None, masked_outputs=0.5)
      ),
      r"masked_outputs 0\.5 of the secondary.* leave it 0",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      module.init(KEY, inputs())


def test_experts_of_ones_own_see_to_their_own_dropout():
  class Own(experts.Linear):
    dropout: float = 0.5

  plain, own = (layer(TOP_K, kind(E, D)) for kind in (experts.Linear, Own))
  at = init(plain, X)["params"]
  close(apply(own, at, inputs(), True)[0], apply(plain, at, inputs(), True)[0])


def test_init_scale_is_the_variance():
  """Of outputs over inputs, of each expert by itself."""
  kind = experts.FeedForward(E, 64, init_scale=0.25)
  for w in jax.jit(lambda: kind.init(KEY, 64)["params"])().values():
    variance = np.var(w.unbox(), axis=(1, 2)) * 64
    np.testing.assert_allclose(variance, 0.25, rtol=0.1)


# -- what is refused -----------------------------------------------------------


@pytest.mark.parametrize(
  "module, message",
  [
    (layer(group_size=5), r"group size 5 .* 16 tokens"),
    (layer(group_size=32), r"group size 32 .* 16 tokens"),
    (layer(group_size=0), "group size 0 "),
    (layer(dispatch="teleport"), r"'teleport'.*einsum.*gather"),
    (layer(kind=experts.FeedForward(E + 2, F)), rf"{E} experts.*\b{E + 2}\b"),
    (layer(router.Single(), experts.Linear(2)), r"\b1 experts.*\b2\b"),
    (layer(eval_capacity_factor=0.0), r"0\.0 .* 4 experts"),
    (layer(router.NoisyTopK(E, E + 1)), rf"k = {E + 1}\b.*\b{E} experts"),
  ],
)
def test_bad_sizes_name_both_numbers(module, message):
  with pytest.raises(ValueError, match=message):
    module.init(KEY, inputs())


@pytest.mark.parametrize(
  "x, options, message",
  [
    (inputs()[:0], {}, r"\(0, 8, 3\), without a token"),
    (inputs().astype(jnp.complex64), {}, "complex64, which no router reads"),
    (X, {"mask": MASK.T}, rf"mask is \({L}, {B}\).*\({B}, {L}\)"),
    (X, {"ids": MASK.T.astype("int32")}, rf"ids is \({L}, {B}\).*\({B}, {L}\)"),
  ],
)
def test_bad_inputs_are_named(x, options, message):
  with pytest.raises(ValueError, match=message):
    layer().init(KEY, x, **options)


# -- a single expert -----------------------------------------------------------

SINGLE = moe.MoE(router.Single(), experts.FeedForward(1, F))


def test_a_single_expert_is_a_mixture_of_one():
  """With its parameters alone, and nothing to report."""
  whole = layer(router.NoisyTopK(1, 1), experts.FeedForward(1, F))
  variables = init(SINGLE, X)
  assert list(variables["params"]) == ["experts"]
  gates = {name: {"kernel": jnp.ones((D, 1))} for name in ("gate", "noise")}
  both = {"router": gates, **variables["params"]}
  for train in (False, True):
    y, routing = apply(whole, both, X, train)
    got, state = SINGLE.apply(variables, X, train, mutable=["routing"])
    close(got, y)
    # No balance to lose, no token to drop.
    assert losses.balance(state) == {}
    assert losses.importance(routing) == 0 and losses.load(routing) == 0
    assert np.asarray(routing.dropped).sum() == 0


class Masked(nn.Module):
  """Adds the number of rows that are real."""

  def __call__(self, rows, mask):
    return rows + mask.sum().astype(rows.dtype)


def test_a_single_expert_is_told_what_is_padding():
  module = moe.MoE(router.Single(), experts.Each(1, Masked()))
  y = module.apply({}, X, mask=RAGGED_MASK)
  want = (X + (L + 1))[RAGGED_MASK]
  np.testing.assert_array_equal(y[RAGGED_MASK], want)


# -- shared experts ------------------------------------------------------------

THREE = experts.FeedForward(3, F, nn.silu, gated=True)


@functools.partial(jax.jit, static_argnums=0)
def slopes(module, params, x):
  """y, and the gradient of the sum of its squares."""

  def score(params, x):
    y = apply(module, params, x, True, RAGGED_MASK)[0]
    return jnp.square(y).sum(), y

  return jax.value_and_grad(score, (0, 1), has_aux=True)(params, x)


@pytest.mark.parametrize(
  "name, recompute", [("einsum", False), ("gather", True), ("ragged", True)]
)
def test_every_token_visits_the_shared_experts(name, recompute):
  """Those without a slot for routed experts too; padding none."""
  options = {"dispatch": name, "recompute": recompute, "capacity_factor": 0.5}
  module = layer(TOP_K, shared=THREE, **options)
  at = kinds.random_params(module, X)
  assert at["shared"]["w_gate"].shape == (1, D, 3 * F)
  (_, y), found = slopes(module, at, X)

  def loops(at):
    """The routed part is judged elsewhere, and its layer known."""
    columns = {n: -2 if n == "w_out" else -1 for n in at["shared"]}
    parts = {n: np.split(at["shared"][n], 3, columns[n]) for n in columns}
    each = [
      reference.feed_forward({n: parts[n][i] for n in parts}, kinds.silu)
      for i in range(3)
    ]
    total = np.zeros(X.shape)
    for b, s in np.argwhere(RAGGED_MASK):
      total[b, s] = sum(expert(0, at["x"][b, s]) for expert in each)
    return total

  routed = {n: at[n] for n in ("router", "experts")}
  module = layer(TOP_K, **options)
  routed_y, vjp = jax.vjp(
    lambda p, x: apply(module, p, x, True, RAGGED_MASK)[0], routed, X
  )
  beside = kinds.in_float64({"x": X, "shared": at["shared"]})
  near(y, routed_y + loops(beside))
  of_routed, of_x = vjp(2 * y)
  want = kinds.finite_differences(
    lambda at: (2 * np.asarray(y) * loops(at)).sum(), beside
  )
  same = functools.partial(kinds.same_gradient, exact=False, rtol=2e-3)
  same(found[0], of_routed | {"shared": want["shared"]})
  same(found[1], of_x + want["x"])


@pytest.mark.parametrize("factor", [1.25, None])
def test_a_layer_of_two_levels_has_shared_experts_once(factor):
  free = {"capacity_factor": factor, "eval_capacity_factor": factor}
  within = moe.MoE(router.TopK(2, 1), experts.FeedForward(2, F), **free)
  module = moe.HierarchicalMoE(router.TopK(2, 1), within, **free, shared=THREE)
  at = kinds.random_params(module, X)
  alone = moe.MoE(router.Single(), module.shared)
  beside = alone.apply({"params": {"experts": at["shared"]}}, X)
  routed = {n: at[n] for n in ("primary", "secondary")}
  both, _ = apply(module, at, X)
  close(both, apply(module.clone(shared=None), routed, X)[0] + beside)


@pytest.mark.parametrize("kind", [experts.Linear(1), experts.Each(1, Masked())])
def test_any_single_expert_may_be_shared(kind):
  """It is told what is padding, which stays zero whatever it makes of it."""
  module = layer(TOP_K, shared=kind, recompute=True)
  at = kinds.random_params(module, X, mask=RAGGED_MASK)
  y, _ = apply(module, at, X, False, RAGGED_MASK)
  routed = {n: at[n] for n in ("router", "experts")}
  routed, _ = apply(layer(TOP_K), routed, X, False, RAGGED_MASK)
  beside = X @ at["shared"]["w"][0] if "shared" in at else X + (L + 1)
  close(y, routed + jnp.where(RAGGED_MASK[..., None], beside, 0))


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: layer(shared=experts.Linear(2)), "2 experts of Linear, but only"),
    (lambda: layer(shared=experts.FeedForward(2, (F, F))), "2 experts of Feed"),
    (lambda: layer(shared=experts.FeedForward(0, F)), "shared is 0 experts"),
    (lambda: layer(shared=router.TopK(2, 1)), "give a module of .*experts"),
    (lambda: layer(shared=experts.Linear(1, D + 1)), "return 4 .* others 3;"),
    (
      lambda: moe.MoE(router.Single(), experts.Linear(1), shared=THREE),
      "Single has 1 expert, .* wider",
    ),
    (
      lambda: moe.HierarchicalMoE(TOP_K, layer(group_size=None, shared=THREE)),
      f"1 of {E} groups .* whole layer",
    ),
  ],
)
def test_shared_experts_that_do_not_fit(make, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: make().init(KEY, X))


# -- where parameters lie ------------------------------------------------------


def mixture(**name):
  name |= {"shared": experts.FeedForward(1, F)}
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
    one = experts.FeedForward(1, F)
    each = experts.Each(E, nn.Dense(D))
    self.first = moe.MoE(self.gate, each, shared=one)
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
  assert set(want["first"]) == {"router", "experts", "shared"}
  within = want["second"]["secondary"]["experts"]
  assert set(within) == {"kinds_0", "kinds_1"}
  for module in (Inline(), nn.remat(Inline)(), InSetup()):
    assert tree(module) == want
  assert tree(Given(mixture(), two_levels())) == want


# -- options -------------------------------------------------------------------


def test_auto_gives_slots_to_experts_that_need_them():
  """Even as one kind of many; ragged dispatch would refuse them."""
  each, linear = experts.Each(2, nn.Dense(D)), experts.Linear(2)
  for kind in (
    experts.Mixed((linear, experts.Mixed((each,)))),
    # A mixture that is an expert itself.
    experts.Each(E, layer(group_size=None)),
  ):
    module = layer(TOP_K, kind, eval_capacity_factor=None)
    jax.eval_shape(lambda module=module: module.init(KEY, inputs()))


@pytest.mark.parametrize("name", ["gather", "ragged"])
def test_recomputing_keeps_no_hidden_layer_and_changes_nothing(name):
  one = experts.FeedForward(1, F)
  at = params(2.0, TOP_K) | {"shared": kinds.draw(one, 1, D)}

  def run(recompute, params, x):
    options = {"capacity_factor": 0.5, "dispatch": name, "shared": one}
    module = layer(TOP_K, recompute=recompute, **options)
    return jnp.square(apply(module, params, x, True, MASK)[0]).sum()

  def hidden(recompute):
    """Shapes of hidden layers among what the backward pass is given."""
    fn = functools.partial(run, recompute)
    saved = jax.eval_shape(lambda: jax.tree.leaves(jax.vjp(fn, at, X)[1]))
    shapes = [leaf.shape for leaf in saved]
    return [s for s in shapes if s[-1:] == (F,) and s[1:] != (D, F)]

  assert hidden(False) and not hidden(True)
  kept, again = (
    jax.jit(jax.value_and_grad(functools.partial(run, recompute), (0, 1)))
    for recompute in (False, True)
  )
  jax.tree.map(close, again(at, X), kept(at, X))


# -- what comes in ------------------------------------------------------------

NUMBERS = np.random.default_rng(0).integers(0, 5, (B, L, D))


@pytest.mark.parametrize("module", [layer(TOP_K), SINGLE])
@pytest.mark.parametrize("dtype", [np.uint8, np.float64, bool])
def test_numbers_are_promoted_as_a_dense_layer_does(dtype, module):
  x, variables = NUMBERS.astype(dtype), init(module, X)
  found = module.apply(variables, x)
  wanted = module.apply(variables, jnp.asarray(x, jnp.float32))
  assert found.dtype == jnp.float32 and np.abs(found).max() > 0.1
  np.testing.assert_array_equal(found, wanted)


def test_a_large_batch_of_numpy_runs_eagerly():
  """Above the edges from which "auto" sorts rows."""
  module = layer(TOP_K, group_size=64)
  x = np.ones((48, 64, D), np.float32)
  mask = np.arange(64)[None] < np.arange(48)[:, None]
  y = module.apply(init(module, x), x, mask=mask)
  assert (np.abs(y).max(-1) > 0).sum() == mask.sum()


@BY_ALL
def test_a_token_that_is_not_finite_spoils_no_other(name):
  module = layer(TOP_K, dispatch=name, eval_capacity_factor=None)
  x, at = jnp.asarray(NUMBERS, jnp.float32), params(0.0, TOP_K)
  sound = jnp.ones((B, L, 1), bool).at[0, 3].set(False)

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def run(x):
    y = module.apply({"params": at}, x)
    return jnp.where(sound, y, 0).sum(), y

  (_, wanted), slope = run(x)
  for value in (np.nan, np.inf, -np.inf):
    (_, y), spoilt = run(x.at[0, 3, 1].set(value))
    assert not np.isfinite(y[0, 3]).any()
    for found, right in ((y, wanted), (spoilt, slope)):
      close(np.where(sound, found, 0), np.where(sound, right, 0))


@BY_ALL
def test_derivatives_forward_are_those_of_einsum(name):
  module, at = layer(TOP_K, dispatch=name), params(0.0, TOP_K)
  direction = jnp.ones_like(X)

  def total(x):
    return (module.apply({"params": at}, x) ** 2).sum()

  def forward(x):
    """Forward, and forward over reverse, as of Hessians."""
    bent = jax.jvp(jax.grad(total), (x,), (direction,))[1]
    return jax.jvp(total, (x,), (direction,))[1], jax.grad(total)(x), bent

  if name != "einsum":
    with pytest.raises(TypeError, match="no derivative forward .*='einsum'"):
      jax.jvp(total, (X,), (direction,))
    return
  found, slope, bent = jax.jit(forward)(X)
  np.testing.assert_allclose(found, slope.sum(), rtol=1e-5)
  assert np.isfinite(bent).all() and np.abs(bent).max() > 0
