"""What a layer may be asked for: ids, dispatch, recomputing, mixed capacity."""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from moejax import dispatch, experts, losses, moe, router, routing, sharding

B, L, D, E, F, K = 2, 8, 3, 4, 5, 2
S = 8
MASK = jnp.asarray(np.arange(B * L).reshape(B, L) % 5 > 0)
IDS = jnp.arange(B * L, dtype=jnp.int32).reshape(B, L)
KEY = jax.random.key(3)
BY_ALL = pytest.mark.parametrize("name", dispatch.DISPATCH)


def layer(gate=None, kind=None, **options):
  options = {"group_size": S, "capacity_factor": None} | options
  gate = gate or router.TopK(E, K)
  return moe.MoE(gate, kind or experts.FeedForward(E, F), **options)


def inputs():
  return jnp.abs(jax.random.normal(jax.random.key(1), (B, L, D)))


def draw(module):
  """Random params; tokens are drawn to the first expert."""
  shapes = jax.eval_shape(lambda: module.init(KEY, inputs(), ids=IDS))
  leaves, tree = jax.tree.flatten(nn.unbox(shapes["params"]))
  random = np.random.default_rng(5)
  drawn = tree.unflatten(
    [jnp.asarray(random.normal(size=w.shape), w.dtype) for w in leaves]
  )
  if "router" in drawn:
    kernel = drawn["router"]["gate"]["kernel"]
    drawn["router"]["gate"]["kernel"] = kernel.at[:, 0].add(2)
  return drawn


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, x, mask=None, ids=None):
  """Returns y and the routing, as in training."""
  y, state = module.apply(
    {"params": params}, x, train=True, mask=mask, ids=ids, mutable=["routing"]
  )
  (routing,) = losses.routings(state)
  return y, routing


def in_float64(tree):
  return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def decisions(params):
  """The reference's, for each group."""
  rows = in_float64(inputs()).reshape(-1, S, D)
  logits = rows @ in_float64(params["router"]["gate"]["kernel"])
  masks = np.asarray(MASK).reshape(-1, S)
  return [reference.top_k(logits[g], K, masks[g]) for g in range(len(logits))]


@BY_ALL
def test_ids_say_where_tokens_go(name):
  module = layer(router.Hash(E, K), dispatch=name)
  params = draw(module)
  y, routing = apply(module, params, inputs(), MASK, IDS)
  expert = reference.feed_forward(in_float64(params["experts"]))
  rows = in_float64(inputs()).reshape(-1, S, D)
  for g, (ids, mask) in enumerate(
    zip(IDS.reshape(-1, S), MASK.reshape(-1, S), strict=True)
  ):
    want = reference.hash_ids(np.asarray(ids), E, K, np.asarray(mask))
    np.testing.assert_array_equal(routing.count[g], want.count)
    np.testing.assert_allclose(
      y.reshape(-1, S, D)[g],
      reference.dispatch(rows[g], want.edges, expert),
      rtol=1e-4,
      atol=1e-5,
    )


EACH = experts.Each(2, nn.Dense(D))
PLAIN = experts.FeedForward(2, F)


@pytest.mark.parametrize(
  "kind, layout, want",
  [
    (experts.FeedForward(E, F), None, "ragged"),
    (experts.Mixed((PLAIN, experts.Linear(2))), None, "ragged"),
    # These need slots, even as one kind of many.
    (experts.Each(E, nn.Dense(D)), None, "gather"),
    (experts.Mixed((PLAIN, EACH)), None, "gather"),
    (experts.Mixed((PLAIN, experts.Mixed((EACH,)))), None, "gather"),
    # So does a mixture that is an expert itself.
    (experts.Each(E, layer(group_size=None)), None, "gather"),
    # Each device has all experts, or its own; nothing bounds their slots.
    (experts.FeedForward(E, F), "replicated", "ragged"),
    (experts.FeedForward(E, F), "expert", "ragged"),
  ],
)
def test_auto_sends_rows_as_experts_can_take_them(
  monkeypatch, kind, layout, want
):
  chosen = []
  for name, send in dispatch.DISPATCH.items():

    def spy(*args, name=name, send=send):
      chosen.append(name)
      return send(*args)

    monkeypatch.setitem(dispatch.DISPATCH, name, spy)
  module = layer(kind=kind, eval_capacity_factor=None)
  on_mesh = contextlib.nullcontext()
  if layout:
    layout = sharding.LAYOUTS[layout]
    mesh = sharding.make_mesh(layout, jax.devices()[:2])
    on_mesh = sharding.use(layout, mesh)
  with on_mesh:
    jax.eval_shape(lambda: module.init(KEY, inputs()))
  assert set(chosen) == {want}


@BY_ALL
def test_recomputing_keeps_no_hidden_layer_and_changes_nothing(name):
  bounded = {"capacity_factor": 0.5, "dispatch": name}
  params = draw(layer())

  def run(recompute, params, x):
    module = layer(recompute=recompute, **bounded)
    y, _ = module.apply(
      {"params": params}, x, train=True, mask=MASK, mutable=["routing"]
    )
    return jnp.square(y).sum()

  def kept(recompute):
    """Shapes of what the backward pass is given."""
    fn = functools.partial(run, recompute)
    saved = jax.eval_shape(
      lambda: jax.tree.leaves(jax.vjp(fn, params, inputs())[1])
    )
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
  plain, again = slopes(params, inputs())
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, again, plain)


def test_dropped_first_are_those_of_first_choices():
  module = layer(capacity_factor=0.5)
  params = draw(module)
  _, routing = apply(module, params, inputs(), MASK)
  dropped = np.asarray(routing.dropped)
  first = np.zeros_like(dropped)
  for g, want in enumerate(decisions(params)):
    # The first choices of all tokens come before all second ones.
    tokens = len({s for s, _, _ in want.edges})
    seats = reference.seated(want.edges, 4)
    for (_, e, _), seated in list(zip(want.edges, seats, strict=True))[:tokens]:
      first[g, e] += not seated
  np.testing.assert_array_equal(routing.dropped_first, first)
  assert 0 < first.sum() < dropped.sum()


def test_experts_that_choose_drop_no_first_choice():
  module = layer(router.Balanced(E, K), capacity_factor=0.1)
  x = jnp.concatenate([inputs()] * 2, axis=1)
  module = module.clone(group_size=2 * L)
  _, routing = apply(module, draw(module), x)
  assert routing.dropped.sum() > 0 and routing.dropped_first.sum() == 0


@BY_ALL
def test_any_leading_axes(name):
  module = layer(capacity_factor=0.5, dispatch=name)
  params = draw(module)

  @jax.jit
  def run(x):
    def one(shape):
      x_, mask = x.reshape(*shape, D), MASK.reshape(shape)
      y, state = module.apply(
        {"params": params}, x_, train=True, mask=mask, mutable=["routing"]
      )
      assert y.shape == (*shape, D)
      return y.reshape(-1, D), losses.routings(state)

    return [one(shape) for shape in ((B, L), (B * L,), (4, 2, 2))]

  want, *others = run(inputs())
  for got in others:
    jax.tree.map(np.testing.assert_array_equal, got, want)


@BY_ALL
def test_kinds_of_experts_have_their_own_capacity(name):
  """1.5 and 0.5 times the mean of 16 * 2 / 4 edges."""
  kinds = (experts.FeedForward(2, F), experts.Linear(2))
  module = layer(
    kind=experts.Mixed(kinds, capacities=(1.5, 0.5)),
    group_size=B * L,
    capacity_factor=1.0,
    dispatch=name,
  )
  params = draw(module)
  y, routing = apply(module, params, inputs())
  at = in_float64(params)
  x = in_float64(inputs()).reshape(B * L, D)
  edges = reference.top_k(x @ at["router"]["gate"]["kernel"], K).edges
  wide, narrow = (at["experts"][f"kinds_{i}"] for i in (0, 1))
  loops = reference.feed_forward(wide), reference.linear(narrow)
  want, dropped = np.zeros_like(x), np.zeros(E)
  for kind, capacity in enumerate((12, 4)):
    mine = [(s, e % 2, gate) for s, e, gate in edges if e // 2 == kind]
    want += reference.dispatch(x, mine, loops[kind], capacity)
    seats = reference.seated(mine, capacity)
    for (_, e, _), seated in zip(mine, seats, strict=True):
      dropped[2 * kind + e] += not seated
  np.testing.assert_allclose(y.reshape(-1, D), want, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(routing.dropped[0], dropped)
  assert dropped[:2].sum() > 0 and dropped[2:].sum() > 0


# -- what comes in ------------------------------------------------------------

DISPATCHES = pytest.mark.parametrize("dispatcher", dispatch.DISPATCH)


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


@DISPATCHES
@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.float64, bool])
def test_numbers_are_promoted_as_a_dense_layer_does(dispatcher, dtype):
  layer, variables, x = of_numbers(dispatcher)
  wanted = layer.apply(variables, jnp.asarray(x.astype(dtype), jnp.float32))
  found = layer.apply(variables, x.astype(dtype))
  assert found.dtype == jnp.float32 and np.abs(found).max() > 0.1
  np.testing.assert_array_equal(found, wanted)


def test_one_expert_promotes_too():
  layer = moe.OneExpert(experts.FeedForward(1, 8))
  x = np.arange(12).reshape(1, 3, 4)
  variables = layer.init(jax.random.key(0), x)
  wanted = layer.apply(variables, x.astype(np.float32))
  np.testing.assert_array_equal(layer.apply(variables, x), wanted)


def test_a_large_batch_of_numpy_runs_eagerly():
  """Above the edges from which "auto" sorts rows."""
  layer = of_numbers("auto")[0].clone(group_size=64)
  x = np.ones((48, 64, 4), np.float32)
  mask = np.arange(64)[None] < np.arange(48)[:, None]
  variables = layer.init(jax.random.key(0), x)
  y = layer.apply(variables, x, mask=mask)
  assert (np.abs(y).max(-1) > 0).sum() == mask.sum()


def test_complex_numbers_are_refused():
  layer, variables, x = of_numbers("auto")
  with pytest.raises(ValueError, match="x is complex64, which no router reads"):
    layer.apply(variables, x.astype(np.complex64))


@DISPATCHES
def test_dispatch_refuses_whole_numbers(dispatcher):
  edges = routing.Assignment(jnp.zeros((1, 8), jnp.int32), jnp.ones((1, 8)))
  with pytest.raises(ValueError, match="rows are int32, .* give them as float"):
    dispatch.DISPATCH[dispatcher](
      lambda weights, rows, real: rows,
      {},
      jnp.ones((1, 8, 4), jnp.int32),
      edges,
      1,
    )


@DISPATCHES
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


@DISPATCHES
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
