"""The layer in programs of others: lifted by linen, and as a module of nnx."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import kinds
import numpy as np
import optax
import pytest
from flax import nnx

from moejax import experts, losses, moe, router, sharding

B, L, D, E, F, K, LAYERS = 2, 8, 4, 4, 8, 2, 2
WEIGHTS = {"importance": 0.1, "load": 0.1}
KEY = jax.random.key(3)
R = "routing"
X, TARGET = jax.random.normal(jax.random.key(1), (2, B, L, D))
# Every layer's own key of this stream is folded from KEY.
APPLY = {"train": True, "rngs": {"router": KEY}, "mutable": ["routing"]}

pytestmark = pytest.mark.usefixtures("standard_promotion")


def flat(cls=moe.MoE, **options):
  options = {"group_size": L, "dispatch": "gather"} | options
  return cls(router.NoisyTopK(E, K), experts.FeedForward(E, F), **options)


def two_levels(cls=moe.HierarchicalMoE, **options):
  secondary = moe.MoE(router.NoisyTopK(2, 1), experts.FeedForward(2, F))
  options = {"group_size": L} | options
  return cls(router.NoisyTopK(2, 1), secondary, **options)


KINDS = {"flat": flat, "two levels": two_levels}
BOTH = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def close(got, want):
  check = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(check, got, want)


def start(model):
  """Random parameters: of zeros the routers would have no gradient."""
  shapes = nn.unbox(jax.eval_shape(model.init, KEY, X))["params"]
  random = np.random.default_rng(0)
  return jax.tree.map(
    lambda w: kinds.to_device(random.normal(size=w.shape) / 2, w.dtype), shapes
  )


@pytest.fixture
def without_shape_checks():
  """As users run it: else the hook of the tests answers in our place."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


# -- what is lost, and what is left -------------------------------------------


def shapes_of(model, variables, *args, **options):
  """What `apply` would return; errors come while it is traced."""
  apply = functools.partial(model.apply, **options)
  return jax.eval_shape(apply, variables, X, *args)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("nothing", [[], {}, {"routing": {}}, X])
def test_nothing_found_where_weights_were_given_is_an_error(nothing):
  with pytest.raises(ValueError, match="importance, load have weights") as e:
    losses.auxiliary(nothing, WEIGHTS)
  assert 'model.apply(..., mutable=["routing"])' in str(e.value)
  assert 'variable_axes={"params": 0, "routing": 0}' in str(e.value)
  assert losses.auxiliary(nothing, {"load": 0.0, "z": 0.0})[0] == 0
  # Weights may be those that a schedule computes.
  with pytest.raises(ValueError, match="the balance losses z have weights"):
    jax.jit(lambda w: losses.auxiliary(nothing, {"z": w, "load": 0})[0])(0.1)


@BOTH
def test_a_routing_of_another_step_is_refused(make):
  model = make()
  variables = {"params": start(model)}
  _, sown = shapes_of(model, variables, **APPLY)
  with pytest.raises(ValueError, match="still holds a routing of an earlier"):
    shapes_of(model, variables | sown, **APPLY)
  shapes_of(model, variables | sown)  # Nobody weighs it there.


class Repeated(nn.Module):
  """One layer in turn after itself, as `lift` makes it."""

  lift: object

  @nn.compact
  def __call__(self, x):
    layer = flat(self.lift(moe.MoE))
    return layer(layer(x))


@pytest.mark.parametrize("lift", [nn.remat, nn.jit])
def test_a_layer_called_twice_reports_twice(lift):
  model = Repeated(lift)
  variables = {"params": start(model)}

  def run():  # nn.jit remembers what it has traced.
    return model.apply(variables, X, mutable=["routing"])

  _, sown = run()
  first, second = losses.routings(run()[1])
  assert np.abs(first.importance - second.importance).max() > 0
  want, _ = losses.auxiliary([first, second], WEIGHTS)
  assert losses.auxiliary(sown, WEIGHTS)[0] == want
  with pytest.raises(ValueError, match="still holds a routing"):
    model.apply(variables | sown, X, mutable=["routing"])


# -- stacks of layers ---------------------------------------------------------


class Block(nn.Module):
  kind: str
  train: bool

  @nn.compact
  def __call__(self, x, _=None):
    return x + KINDS[self.kind]()(x, train=self.train), None


class Stack(nn.Module):
  """Blocks one after the other, each with its own weights, in a scan."""

  kind: str
  axes: dict
  lift: object = staticmethod(lambda cls: cls)

  @nn.compact
  def __call__(self, x, train=False):
    blocks = nn.scan(
      self.lift(Block),
      variable_axes={"params": 0, **self.axes},
      split_rngs={"params": True, "router": True},
      length=LAYERS,
    )
    return blocks(self.kind, train, name="blocks")(x)[0]


def test_a_stack_is_its_layers():
  """Without a name for the new axis, and each router gets its gradient."""
  stack = Stack("two levels", {"routing": 0}, nn.remat)
  params = start(stack)
  # Without noise: a scan splits its key differently.
  block = Block("two levels", False)

  def scanned(params):
    return stack.apply({"params": params}, X, mutable=["routing"])

  def in_turn(params):
    x, all_sown = X, []
    for i in range(LAYERS):
      own = jax.tree.map(lambda w, i=i: w[i], params["blocks"])
      (x, _), sown = block.apply({"params": own}, x, mutable=["routing"])
      all_sown.append(sown)
    return x, all_sown

  def loss(run, params):
    y, sown = run(params)
    assert len(losses.routings(sown)) == LAYERS
    aux, parts = losses.auxiliary(sown, {"importance": 0.3, "z": 0.1})
    return jnp.square(y - TARGET).mean() + aux, (aux, parts)

  run = jax.jit(jax.value_and_grad(loss, 1, has_aux=True), static_argnums=0)
  got = run(scanned, params)
  close(got, run(in_turn, params))
  for path, slope in jax.tree.leaves_with_path(got[1]):
    if "noise" not in jax.tree_util.keystr(path):
      assert (np.abs(slope).reshape(LAYERS, -1).max(axis=1) > 0).all()


def test_a_stack_that_keeps_its_routing_is_told_of():
  stack = Stack("flat", {})
  _, sown = shapes_of(stack, {"params": start(stack)}, **APPLY)
  with pytest.raises(ValueError, match='"routing": 0'):
    losses.auxiliary(sown, WEIGHTS)


@pytest.mark.parametrize("axis", [1, -1])
def test_routings_stand_in_front_of_a_stack(axis):
  stack = Stack("flat", {"routing": axis})
  with pytest.raises(ValueError, match=f'along axis {axis}.*"routing": 0'):
    shapes_of(stack, {"params": start(stack)}, **APPLY)


def test_an_axis_of_layers_may_have_a_name():
  boxed = jax.eval_shape(Stack("flat", {"routing": 0}).init, KEY, X)
  names = nn.get_partition_spec(boxed)["params"]["blocks"]
  assert names["MoE_0"]["experts"]["w_in"] == jax.P(
    None, "expert", "embed", "mlp"
  )
  named = nn.vmap(
    moe.MoE,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    metadata_params={nn.PARTITION_NAME: "layers"},
  )
  boxed = jax.eval_shape(flat(named).init, KEY, X)
  names = nn.get_partition_spec(boxed)["params"]["experts"]
  assert names["w_in"] == jax.P("layers", "expert", "embed", "mlp")


# -- train --------------------------------------------------------------------


def test_remat_takes_train_by_its_place():
  plain, again = flat(), flat(nn.remat(moe.MoE, static_argnums=(2,)))
  params = start(plain)
  options = {name: APPLY[name] for name in ("rngs", "mutable")}

  def loss(model, params):
    y, sown = model.apply({"params": params}, X, True, **options)
    return jnp.square(y).mean() + losses.auxiliary(sown, WEIGHTS)[0]

  run = jax.jit(jax.value_and_grad(loss, 1), static_argnums=0)
  close(run(again, params), run(plain, params))


def test_vmap_takes_train_and_mask_by_their_place():
  """Flax gives no keywords to what it maps."""
  several = nn.vmap(
    moe.MoE,
    in_axes=(0, None, 0),
    variable_axes={"params": None, "routing": 0},
    split_rngs={"params": False, "router": True},
  )
  model = flat(several)
  params = start(flat())
  x, mask = jnp.stack([X, TARGET]), jnp.zeros((2, B, L), bool).at[0].set(True)
  apply = jax.jit(model.apply, static_argnums=(2,), static_argnames="mutable")
  (y, sown), (same, _) = (
    apply({"params": params}, x, True, mask, rngs={"router": key}, mutable=(R,))
    for key in (KEY, jax.random.key(4))
  )
  assert not y[1].any() and y[0].any()
  assert np.abs(y[0] - same[0]).max() > 1e-3
  count = sum(routing.count.sum() for routing in losses.routings(sown))
  assert count == K * B * L


class Dropping(nn.Module):
  """An expert as users of Flax write them."""

  @nn.compact
  def __call__(self, x, deterministic=True):
    return nn.Dropout(0.5)(nn.Dense(D)(x), deterministic=deterministic)


def test_experts_learn_what_train_is():
  """As `deterministic`; by its place, too, as `nn.remat` wants it."""
  again = nn.remat(moe.MoE, static_argnums=(2,))
  inner = [
    cls(router.TopK(2, 1), experts.FeedForward(2, F))
    for cls in (moe.MoE, again)
  ]
  plain, lifted = (
    moe.MoE(router.TopK(E, K), experts.Each(E, each)) for each in inner
  )
  params = start(plain)

  @functools.partial(jax.jit, static_argnums=(0, 3))
  def run(model, params, key, train=True):
    rngs = {"dropout": key, "router": key}
    return model.apply({"params": params}, X, train, rngs=rngs)

  close(run(lifted, params, KEY), run(plain, params, KEY))
  dropping = moe.MoE(router.TopK(E, K), experts.Each(E, Dropping()))
  params, other = start(dropping), jax.random.key(4)
  first, second = (run(dropping, params, key) for key in (KEY, other))
  assert np.abs(first - second).max() > 1e-3
  still = (run(dropping, params, key, False) for key in (KEY, other))
  np.testing.assert_array_equal(*still)


@pytest.mark.usefixtures("without_shape_checks")
def test_sizes_may_be_numpys():
  four, eight = np.array([E, F])
  layer = moe.MoE(router.TopK(four, K), experts.FeedForward(four, eight))
  plain = moe.MoE(router.TopK(E, K), experts.FeedForward(E, F))
  params = start(plain)
  close(layer.apply({"params": params}, X), plain.apply({"params": params}, X))


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_programs_with_64_bits(dtype):
  """Rows keep their type, sorted ones too, at two levels too."""
  free = {"capacity_factor": None}
  within = moe.MoE(router.TopK(2, 1), experts.FeedForward(2, F), **free)
  layers = (
    moe.MoE(router.TopK(E, K), experts.FeedForward(E, F), L, **free),
    moe.HierarchicalMoE(router.TopK(2, 1), within, L, **free),
  )
  with jax.enable_x64(True):
    x = jnp.ones((B, L, D), dtype)
    for layer in layers:
      params = nn.unbox(jax.eval_shape(layer.init, KEY, x))["params"]

      def loss(params, x, layer=layer):
        return layer.apply({"params": params}, x, train=True).sum()

      slopes = jax.eval_shape(jax.grad(loss, (0, 1)), params, x)
      assert slopes[1].dtype == dtype
      assert {leaf.dtype.name for leaf in jax.tree.leaves(slopes[0])} == {
        "float32"
      }


@pytest.mark.usefixtures("without_shape_checks")
@BOTH
def test_train_decides_what_is_compiled(make):
  layer = make()
  variables = {"params": start(layer)}
  match = r"train is of type .*static_argnames='train'.*static_argnums=\(2,\)"
  with pytest.raises(ValueError, match=match):
    shapes_of(layer, variables, True)
  with pytest.raises(ValueError, match=match):
    shapes_of(make(nn.remat(type(layer))), variables, train=True)
  with pytest.raises(ValueError, match=match):
    layer.apply(variables, X, jnp.ones((B, L), bool))
  dropping = experts.FeedForward(8, 4, dropout=0.5)
  alone = moe.MoE(router.Single(), dropping.clone(num_experts=1))
  for each in (moe.MoE(router.TopK(8, 2), dropping), alone):
    with pytest.raises(ValueError, match=match):
      shapes_of(each, {"params": start(each)}, True)
  shapes = jax.eval_shape(
    jax.jit(layer.apply, static_argnames="train"), variables, X, train=False
  )
  assert shapes.shape == X.shape


GATES, LINEAR = router.TopK(8, 2), experts.Linear(8)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
  "cls, arguments, message",
  [
    (moe.MoE, (8, 2), r"router is 8; .*NoisyTopK\("),
    (moe.MoE, ("top_k", LINEAR), "router is 'top_k';"),
    (moe.MoE, (router.TopK, LINEAR), "router is the class TopK;"),
    (moe.MoE, (LINEAR, GATES), "router is of type Linear;"),
    (moe.MoE, (GATES, experts.FeedForward), r"class .*; .*FeedForward\("),
    (moe.MoE, (GATES, lambda x: x), "experts is of type function;"),
    (moe.MoE, (GATES, nn.Dense(8)), r"experts is of type Dense; .*Each\("),
    (moe.HierarchicalMoE, (GATES, LINEAR), "secondary is .*; give the MoE"),
    (moe.HierarchicalMoE, (flat(), GATES), "primary is of type MoE;"),
    (experts.Each, (8, nn.Dense), "expert is the class Dense;"),
    (experts.Mixed, ((LINEAR, nn.Dense),), r"kinds\[1\] is the class Dense;"),
  ],
)
def test_what_is_no_router_or_expert_is_told(cls, arguments, message):
  with pytest.raises(ValueError, match=message):
    cls(*arguments)


# -- nnx ----------------------------------------------------------------------

ROUTING = nnx.PathContains("routing")


def in_nnx(layer, **streams):
  rngs = nnx.Rngs(0, **streams)
  return nnx.bridge.ToNNX(layer, rngs=rngs).lazy_init(X)


def test_steps_in_nnx_are_those_of_linen():
  layer, tx = flat(), optax.adam(1e-2)
  params = start(layer)
  model = in_nnx(layer)
  nnx.update(model, params)
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  state, size = tx.init(params), len(jax.tree.leaves(nnx.state(model)))
  traces = []

  def total(y, sown):
    aux, _ = losses.auxiliary(sown, WEIGHTS)
    return jnp.square(y - TARGET).mean() + aux, aux

  @jax.jit
  def in_linen(params, state, key):
    def loss(params):
      options = APPLY | {"rngs": {"router": key}}
      return total(*layer.apply({"params": params}, X, **options))

    values, slope = jax.value_and_grad(loss, has_aux=True)(params)
    updates, state = tx.update(slope, state, params)
    return values, optax.apply_updates(params, updates), state

  @nnx.jit
  def step(model, optimizer, key):
    traces.append(key)

    def loss(model):
      y = model(X, train=True, rngs=key, mutable=["routing"])
      return total(y, nnx.pop(model, ROUTING))

    values, slope = nnx.value_and_grad(loss, has_aux=True)(model)
    optimizer.update(model, slope)
    return values

  for i in range(4):
    key = jax.random.fold_in(KEY, i)
    want, params, state = in_linen(params, state, key)
    close(step(model, optimizer, key), want)
    assert len(jax.tree.leaves(nnx.state(model))) == size
  assert len(traces) == 1
  close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), params)


def test_nnx_says_where_a_routing_was_left_or_not_asked_for():
  def run():
    model = in_nnx(flat())
    model(X, train=True)
    with pytest.raises(ValueError, match="no routing of an MoE layer to weigh"):
      losses.auxiliary(nnx.pop(model, ROUTING), WEIGHTS)
    model(X, train=True, mutable=["routing"])
    model(X)
    with pytest.raises(ValueError, match=r"nnx.pop\(model, nnx.PathContains"):
      model(X, train=True, mutable=["routing"])
    assert len(losses.routings(nnx.pop(model, ROUTING))) == 1
    model(X, train=True, mutable=["routing"])

  nnx.eval_shape(run)


@pytest.mark.parametrize("streams", [{}, {"router": 1}])
def test_nnx_draws_other_noise_in_every_call(streams):
  model = in_nnx(flat(), **streams)
  nnx.update(model, start(flat()))

  @nnx.jit
  def logits(model):
    model(X, train=True, mutable=["routing"])
    (routing,) = losses.routings(nnx.pop(model, ROUTING))
    return routing.logits

  first, second = logits(model), logits(model)
  assert (np.abs(first - second) > 0).all()


def test_nnx_reports_every_layer_of_a_model():
  def run():
    layers = nnx.List([in_nnx(make()) for make in KINDS.values()])
    for _ in range(2):
      for layer in layers:
        layer(X, train=True, mutable=["routing"])
      sown = nnx.pop(layers, ROUTING)
      assert len(losses.routings(sown)) == 2
      losses.auxiliary(sown, WEIGHTS)

  nnx.eval_shape(run)


def test_nnx_scans_over_layers():
  params = start(Stack("flat", {}))["blocks"]

  @nnx.split_rngs(splits=LAYERS)
  @nnx.vmap
  def create(rngs):
    return nnx.bridge.ToNNX(Block("flat", False), rngs=rngs).lazy_init(X)

  @nnx.jit
  @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
  def forward(x, layer):
    return layer(x, mutable=["routing"])[0]

  layers = create(nnx.Rngs(0))
  nnx.update(layers, params)
  y = forward(X, layers)
  sown = nnx.pop(layers, ROUTING)
  stack = functools.partial(
    Stack("flat", {"routing": 0}).apply, mutable=["routing"]
  )
  want, want_sown = jax.jit(stack)({"params": {"blocks": params}}, X)
  close(y, want)
  close(losses.auxiliary(sown, WEIGHTS), losses.auxiliary(want_sown, WEIGHTS))


@pytest.mark.parametrize("rules", ["none", "ours"])
def test_nnx_on_a_mesh(rules):
  """Where rules say how parameters lie, they lie so from the beginning."""
  params = start(flat())
  want = in_nnx(flat())
  nnx.update(want, params)
  y = want(X)
  layout = sharding.LAYOUTS["expert"]
  devices = jax.devices()[:2]
  mesh = sharding.make_mesh(layout, devices)
  use = jax.set_mesh(mesh) if rules == "none" else sharding.use(layout, mesh)
  with use:
    model = nnx.jit(lambda: in_nnx(flat()))()
    spec = model.experts["w_in"].get_value().sharding.spec
    assert (spec[:1] == ("expert",)) == (rules == "ours")
    nnx.update(model, params)
    close(nnx.jit(lambda model: model(X))(model), y)
