"""The whole layer against eq. 1, its groups, capacity, padding and errors."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import reference_losses

from moejax import dispatch, experts, gating, losses, moe, router

B, L, D, E, F, K = 2, 8, 3, 4, 5, 2
S = 8
TOKENS = B * L
KEY = jax.random.key(3)


def layer(**options):
  options = {"group_size": S, "capacity_factor": None} | options
  return moe.MoE(router.NoisyTopK(E, K), experts.FeedForward(E, F), **options)


def inputs(seed=1):
  return jax.random.normal(jax.random.key(seed), (B, L, D))


@functools.cache
def params(skew=0.0):
  """Params of `layer`, all random; skew draws tokens to the first expert."""
  shapes = jax.eval_shape(
    lambda: layer().init({"params": KEY}, jnp.zeros((B, L, D)))["params"]
  )
  leaves, tree = jax.tree.flatten(nn.unbox(shapes))
  random = np.random.default_rng(5)
  drawn = tree.unflatten(
    [jnp.asarray(random.normal(size=w.shape), w.dtype) for w in leaves]
  )
  kernel = drawn["router"]["gate"]["kernel"]
  drawn["router"]["gate"]["kernel"] = kernel.at[:, 0].add(skew)
  return drawn


@functools.partial(jax.jit, static_argnames=("module", "train"))
def jitted(module, params, x, train, mask, key):
  rngs = {"router": key} if train else {}
  y, state = module.apply(
    {"params": params},
    x,
    train=train,
    mask=mask,
    rngs=rngs,
    mutable=["routing"],
  )
  return y, state["routing"]


def apply(module, params, x, train=False, mask=None, key=KEY):
  """Returns y and the routing."""
  y, sown = jitted(module, params, x, train, mask, key)
  (routing,) = losses.routings(sown)
  return y, routing


def in_float64(tree):
  return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def noise_std(at):
  x = at["x"].reshape(-1, S, D)
  return np.logaddexp(0, x @ at["router"]["noise"]["kernel"]) + 1e-2


def decisions(at, noise, mask):
  """The reference's decision for each group; noise None is evaluation."""
  logits = at["x"].reshape(-1, S, D) @ at["router"]["gate"]["kernel"]
  stds = noise_std(at)
  masks = [None] * len(logits) if mask is None else mask.reshape(-1, S)
  if noise is None:
    return [reference.top_k(logits[g], K, masks[g]) for g in range(len(logits))]
  return [
    reference.noisy_top_k(logits[g], noise[g], stds[g], K, masks[g])
    for g in range(len(logits))
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


MASK = jnp.asarray(np.arange(TOKENS).reshape(B, L) % 5 > 0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", dispatch.DISPATCH)
def test_is_the_mixture_of_eq_1(name, train, masked):
  module = layer(dispatch=name, eval_capacity_factor=None)
  mask = MASK if masked else None
  y, routing = apply(module, params(), inputs(), train, mask)
  at = in_float64({**params(), "x": inputs()})
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
  if masked:
    assert (np.asarray(y)[~np.asarray(mask)] == 0).all()


@pytest.mark.parametrize("name", dispatch.DISPATCH)
def test_gradient_of_the_whole_layer(name):
  """Task and balance losses, to every weight and to x, drops included."""
  module = layer(dispatch=name, capacity_factor=0.5)
  out = np.random.default_rng(8).normal(size=(B, L, D))

  @jax.jit
  def score(at):
    variables = {"params": {k: at[k] for k in ("router", "experts")}}
    y, state = module.apply(
      variables, at["x"], train=True, rngs={"router": KEY}, mutable=["routing"]
    )
    aux, _ = losses.auxiliary(state, {"importance": 0.3, "load": 0.7})
    return (y * jnp.asarray(out, y.dtype)).sum() + aux

  at = {**params(), "x": inputs()}
  _, routing = apply(module, params(), inputs(), True)
  assert np.asarray(routing.dropped).sum() > 0
  noise = recover_noise(in_float64(at), routing)

  def reference_score(flat):
    at = jax.tree.unflatten(tree, list(flat.values()))
    y, found = expected(at, noise, capacity=4)
    importance = sum(d.importance for d in found)
    load = sum(d.load for d in found)
    return (
      (y * out).sum()
      + 0.3 * reference_losses.cv_squared(importance)
      + 0.7 * reference_losses.cv_squared(load)
    )

  leaves, tree = jax.tree.flatten(in_float64(at))
  flat = {str(i): leaf for i, leaf in enumerate(leaves)}
  np.testing.assert_allclose(score(at), reference_score(flat), rtol=1e-4)
  want = reference.gradient(reference_score, flat)
  got = jax.tree.leaves(jax.grad(score)(at))
  for ours, theirs in zip(got, want.values(), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", dispatch.DISPATCH)
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
  logits = in_float64(x).reshape(TOKENS, D) @ in_float64(
    at["router"]["gate"]["kernel"]
  )
  want = reference.top_k(logits, K)
  for train, slots in ((True, 5), (False, 10)):
    y, routing = apply(module, at, x, train)
    dropped = np.maximum(want.count - slots, 0)
    assert dropped.sum() > 0
    np.testing.assert_array_equal(routing.dropped, dropped[None])
    np.testing.assert_array_equal(routing.count, want.count[None])
    seats = reference.seated(want.edges, slots)
    assert seats.count(False) == dropped.sum()
    expert = reference.feed_forward(in_float64(at["experts"]))
    rows = in_float64(x).reshape(TOKENS, D)
    np.testing.assert_allclose(
      y.reshape(TOKENS, D),
      reference.dispatch(rows, want.edges, expert, slots),
      rtol=1e-4,
      atol=1e-4,
    )


def test_defaults_are_bounded_and_roomier_in_evaluation():
  module = moe.MoE(router.TopK(E, K), experts.FeedForward(E, F))
  assert module.capacity_factor == 1.25
  assert module.eval_capacity_factor == 2.0
  assert module.group_size is None


@pytest.mark.parametrize("train", [False, True])
def test_groups_are_routed_each_alone(train):
  """Groups of consecutive tokens with seats of their own."""
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


def test_groups_may_cross_rows():
  """Without drops or noise grouping changes nothing at all."""
  want, _ = apply(layer(eval_capacity_factor=None), params(), inputs())
  for group_size in (None, 1, 4, TOKENS):
    module = layer(group_size=group_size, eval_capacity_factor=None)
    y, routing = apply(module, params(), inputs())
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
    assert routing.logits.shape[0] == TOKENS // (group_size or TOKENS)


def test_padding_takes_no_seat():
  """What stands in masked places changes nothing elsewhere."""
  module = layer(capacity_factor=0.5, eval_capacity_factor=0.5)
  other = jnp.where(MASK[..., None], inputs(), 9)
  for train in (False, True):
    y, routing = apply(module, params(2.0), inputs(), train, MASK)
    same, also = apply(module, params(2.0), other, train, MASK)
    np.testing.assert_array_equal(y, same)
    np.testing.assert_array_equal(routing.load, also.load)
    np.testing.assert_array_equal(routing.dropped, also.dropped)


def test_routing_is_sown_only_when_asked_for():
  y = layer().apply({"params": params()}, inputs())
  want, routing = apply(layer(), params(), inputs())
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
  gates = gating.top_k(
    inputs().reshape(-1, S, D) @ params()["router"]["gate"]["kernel"], K
  )
  np.testing.assert_allclose(routing.importance, gates.importance, atol=1e-5)


def test_variables_of_init_may_be_passed_on_whole():
  """The obvious first lines must not find each layer twice."""
  variables = layer().init({"params": KEY}, inputs())
  _, state = layer().apply(variables, inputs(), mutable=["routing"])
  assert len(losses.routings(state)) == 1


def test_bfloat16_in_bfloat16_out():
  module = layer(eval_capacity_factor=None)
  y, routing = apply(module, params(), inputs().astype(jnp.bfloat16))
  assert y.dtype == jnp.bfloat16 and routing.logits.dtype == jnp.float32
  want, _ = apply(module, params(), inputs())
  scale = np.abs(want).max()
  np.testing.assert_allclose(y.astype(jnp.float32), want, atol=0.05 * scale)


def test_one_expert_is_a_mixture_of_one():
  one = moe.OneExpert(experts.FeedForward(1, F))
  whole = moe.MoE(
    router.NoisyTopK(1, 1), experts.FeedForward(1, F), group_size=S
  )
  variables = nn.unbox(one.init({"params": KEY}, inputs()))
  assert list(variables["params"]) == ["experts"]
  gates = {name: {"kernel": jnp.ones((D, 1))} for name in ("gate", "noise")}
  for train in (False, True):
    y, routing = apply(
      whole, {"router": gates, **variables["params"]}, inputs(), train
    )
    got = one.apply(variables, inputs(), train=train)
    np.testing.assert_allclose(got, y, rtol=1e-5, atol=1e-6)
    # No balance to lose, no token to drop.
    assert losses.importance(routing) == 0 and losses.load(routing) == 0
    assert np.asarray(routing.dropped).sum() == 0
  _, state = one.apply(variables, inputs(), mutable=["routing"])
  assert losses.routings(state) == []


@pytest.mark.parametrize(
  "module, message",
  [
    (layer(group_size=5), r"group size 5 .* 16 tokens"),
    (layer(group_size=32), r"group size 32 .* 16 tokens"),
    (layer(group_size=0), "group size 0 "),
    (layer(group_size=-4), "group size -4 "),
    (layer(dispatch="teleport"), r"'teleport'.*einsum.*gather"),
    (
      moe.MoE(router.NoisyTopK(E, K), experts.FeedForward(E + 2, F)),
      rf"\b{E} experts.*\b{E + 2}\b",
    ),
    (layer(eval_capacity_factor=0.0), r"0\.0 .* 4 experts"),
    (
      moe.MoE(router.NoisyTopK(E, E + 1), experts.FeedForward(E, F)),
      rf"k = {E + 1}\b.*\b{E} experts",
    ),
    (
      moe.MoE(
        router.TopK(1, 1),
        experts.Mixed((experts.Linear(1),), (1.0, 0.5)),
        eval_capacity_factor=None,
      ),
      "capacities of 2 kinds .* but 1 kinds",
    ),
  ],
)
def test_bad_sizes_name_both_numbers(module, message):
  with pytest.raises(ValueError, match=message):
    module.init({"params": KEY}, inputs())


@pytest.mark.parametrize("size", [None, S])
def test_a_batch_without_a_token_is_refused(size):
  with pytest.raises(ValueError, match=r"\(0, 8, 3\), without a token"):
    layer(group_size=size).init({"params": KEY}, inputs()[:0])


@pytest.mark.parametrize("name", dispatch.DISPATCH)
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


def test_one_expert_gives_zero_at_padding():
  module = moe.OneExpert(experts.FeedForward(1, F))
  mask = jnp.arange(L)[None] < jnp.array([[L], [1]])
  y, _ = module.init_with_output(KEY, inputs(), mask=mask)
  whole, _ = module.init_with_output(KEY, inputs())
  assert (y[~mask] == 0).all()
  np.testing.assert_array_equal(y[mask], whole[mask])


def test_nan_in_padding_of_one_expert_stays_there():
  module = moe.OneExpert(experts.FeedForward(1, F))
  mask = jnp.arange(L)[None] < jnp.array([[L], [1]])
  variables = nn.unbox(module.init(KEY, inputs()))

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1))
  def slopes(variables, x):
    return jnp.square(module.apply(variables, x, mask=mask)).sum()

  want = slopes(variables, inputs())
  got = slopes(variables, jnp.where(mask[..., None], inputs(), jnp.nan))
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert (got[1][~mask] == 0).all()


class Masked(nn.Module):
  """Adds the number of rows that are real."""

  def __call__(self, rows, mask):
    return rows + mask.sum().astype(rows.dtype)


def test_one_expert_is_told_what_is_padding():
  module = moe.OneExpert(experts.Each(1, Masked()))
  mask = jnp.arange(L)[None] < jnp.array([[L], [1]])
  y = module.apply({}, inputs(), mask=mask)
  np.testing.assert_array_equal(y[mask], (inputs() + (L + 1))[mask])


@pytest.mark.parametrize("name", ["mask", "ids"])
def test_mask_or_ids_of_another_shape_are_refused(name):
  values = {"mask": jnp.ones((L, B), bool), "ids": jnp.ones((L, B), jnp.int32)}
  message = rf"{name} is \({L}, {B}\).*\({B}, {L}\)"
  with pytest.raises(ValueError, match=message):
    layer().init(KEY, inputs(), **{name: values[name]})
