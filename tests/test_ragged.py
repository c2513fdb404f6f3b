"""Sorted rows over split experts: both moves, against one device."""

import collections
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest

from moejax import dispatch, experts, losses, moe, router, routing, sharding
from moejax.planning import collectives

# Two groups a device, two experts a device where 4 devices share them.
G, S, D, E, F, K, A = 16, 3, 4, 8, 6, 2, 7
# The devices that share an expert have the same tokens.
COPIES = sharding.Layout(
  "copies", (1, -1, 2), sharding.rules(batch=("data", "expert"))
)
SPLIT = [
  layout
  for layout in (*sharding.LAYOUTS.values(), COPIES)
  if sharding.make_mesh(layout).shape["expert"] > 1
]
LAYOUT = pytest.mark.parametrize("layout", SPLIT, ids=lambda each: each.name)
MOVE = pytest.mark.parametrize("move", ["all_gather", "all_to_all"])


def emulated(
  operand,
  output,
  input_offsets,
  send_sizes,
  output_offsets,
  recv_sizes,
  *,
  axis_name,
):
  """What jax.lax.ragged_all_to_all is documented to do; NaN if misused."""
  n, me = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
  operands, *slices = (
    jax.lax.all_gather(a, axis_name)
    for a in (operand, input_offsets, send_sizes, output_offsets)
  )
  # Of the slices that come here, sender by sender.
  start, size, to = (a.reshape(n, n, -1)[:, me].reshape(-1) for a in slices)
  sender = jnp.arange(n).repeat(start.size // n)
  row = jnp.arange(output.shape[0])[:, None]
  inside = (row >= to[None]) & (row < (to + size)[None])
  of_row = inside.argmax(axis=1)
  source = start[of_row] + row[:, 0] - to[of_row]
  got = operands[sender[of_row], source]
  right = (
    (size == recv_sizes).all()
    & (inside.sum(axis=1) <= 1).all()
    & (to + size <= output.shape[0]).all()
    & (start + size <= operand.shape[0]).all()
  )
  result = jnp.where(inside.any(axis=1)[:, None], got, output)
  # No number of an edge is below zero.
  is_float = jnp.issubdtype(result.dtype, jnp.floating)
  return jnp.where(right, result, jnp.nan if is_float else -1)


def pretend(patch):
  """Gives a CPU what it does not have."""
  patch.setattr(jax.lax, "ragged_all_to_all", emulated)
  patch.setattr(sharding, "platform", lambda: "tpu")


def draw(seed):
  random = np.random.default_rng(seed)
  shapes = {"x": (G, S, D), "w_in": (E, D, F), "w_out": (E, F, D)}
  return {
    name: jnp.asarray(random.normal(size=shape), jnp.float32)
    for name, shape in shapes.items()
  }


def choices(random):
  """Tokens choose; most want expert 0, and some are padding."""
  order = np.argsort(random.random((G, S, E)), -1)
  order[random.random((G, S)) < 0.5] = np.arange(E)
  expert = order[..., :K]
  expert[random.random((G, S)) < 0.2] = E
  gate = random.uniform(0.1, 1, expert.shape)
  return routing.from_token_choice(
    jnp.asarray(expert, jnp.int32), jnp.asarray(gate, jnp.float32)
  )


def picks(random):
  """Experts choose: pairs of a token and an expert, and unused edges."""
  pair = np.argsort(random.random((G, S * E)), -1)[:, :A]
  expert = np.where(random.random(pair.shape) < 0.2, E, pair // S)
  gate = random.uniform(0.1, 1, pair.shape)
  return routing.Assignment(
    jnp.asarray(expert, jnp.int32),
    jnp.asarray(gate, jnp.float32),
    jnp.asarray(pair % S, jnp.int32),
  )


def crowd(random):
  """All tokens choose the same experts: as many rows as can come."""
  expert = np.broadcast_to(np.array([3, 6], np.int32), (G, S, K))
  gate = random.uniform(0.1, 1, expert.shape)
  return routing.from_token_choice(
    jnp.asarray(expert), jnp.asarray(gate, jnp.float32)
  )


KINDS = {"choices": choices, "picks": picks, "crowd": crowd}


def feed_forward(weights, rows, group_sizes):
  """Experts who make something of nothing, which must be lost."""
  end = jnp.cumsum(group_sizes)
  rank = jnp.arange(rows.shape[0], dtype=jnp.int32)
  expert = jnp.searchsorted(end, rank, side="right").clip(
    max=group_sizes.size - 1
  )
  h = nn.relu(jnp.einsum("ND,NDF->NF", rows, weights["w_in"][expert]))
  y = jnp.einsum("NF,NFO->NO", h, weights["w_out"][expert])
  past = (rank >= end[-1])[:, None]
  # Products of sorted rows are promised zeros there.
  clean = jnp.where(past, rows == 0, True).all()
  return jnp.where(clean, jnp.where(past, jnp.float32(7), y), jnp.nan)


def score(capacity, at, assignment, out, expert_fn=feed_forward):
  weights = {key: at[key] for key in ("w_in", "w_out")}
  assignment = assignment._replace(gate=at["gate"])
  y = dispatch.DISPATCH["ragged"](
    expert_fn, weights, at["x"], assignment, E, capacity
  )
  return (y * out).sum(), y


def places(mesh, at):
  """Where the arrays lie; the experts' hidden axis may lie over "model"."""
  axes = {
    "x": ("group", None, None),
    "gate": ("group", None),
    "w_in": ("expert", None, "mlp"),
    "w_out": ("expert", "mlp", None),
  }
  return {
    name: jax.sharding.NamedSharding(mesh, nn.logical_to_mesh_axes(axes[name]))
    for name in at
  }


@functools.cache
def on_one_device(capacity):
  return jax.jit(
    jax.value_and_grad(functools.partial(score, capacity), has_aux=True)
  )


@functools.cache
def on_all_devices(layout, move, capacity, kind, forward=False):
  """Returns the compiled program, (at, assignment, out) -> as on one."""
  mesh = sharding.make_mesh(layout)
  fn = functools.partial(score, capacity)
  example = arguments(kind, 0)
  with pytest.MonkeyPatch.context() as patch, sharding.use(layout, mesh):
    if move == "all_to_all":
      pretend(patch)
    there = places(mesh, example[0])
    of_group = there["x"]
    kept = ((None, of_group), there)
    if not forward:
      fn = jax.value_and_grad(fn, has_aux=True)
    run = jax.jit(
      fn,
      in_shardings=(there, there["gate"], of_group),
      out_shardings=kept[0] if forward else kept,
    )
    return run.lower(*example).compile()


def arguments(kind, seed):
  random = np.random.default_rng(seed)
  assignment = KINDS[kind](random)
  at = {**draw(seed), "gate": assignment.gate}
  out = jnp.asarray(random.normal(size=(G, S, D)), jnp.float32)
  return at, assignment, out


@pytest.mark.parametrize(
  "kind, capacity", [("choices", None), ("choices", 1), ("picks", 1)]
)
@MOVE
@LAYOUT
def test_layouts_agree_with_one_device(layout, move, kind, capacity):
  """Values and gradients; where tokens choose, however many choose alike."""
  run = on_all_devices(layout, move, capacity, kind)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  for case in (kind, "crowd") if kind == "choices" else (kind,):
    for seed in range(2):
      at, *rest = arguments(case, seed)
      (_, y), slopes = run(at, *rest)
      (_, want), want_slopes = on_one_device(capacity)(at, *rest)
      close(y, want)
      jax.tree.map(close, slopes, want_slopes)
      taken = set(np.asarray(rest[0].expert).flat)
      for e in range(E):
        assert np.any(slopes["w_in"][e]) == (e in taken)


@pytest.mark.parametrize(
  "name, capacity, buffer_size",
  [
    # Of each of its experts all tokens, but never more than all edges.
    ("expert", None, G * S),
    ("data_expert", None, G // 2 * S * K),
    ("data_expert", S + 1, G // 2 * S * K),
    ("data_expert", 1, G // 2 * 2),
  ],
)
@MOVE
def test_the_buffer_holds_all_rows_that_can_come(
  monkeypatch, move, name, capacity, buffer_size
):
  layout, seen = sharding.LAYOUTS[name], []

  def spy(weights, rows, group_sizes):
    shapes = weights["w_in"].shape, rows.shape, group_sizes.shape
    seen.append(shapes)
    return rows

  if move == "all_to_all":
    pretend(monkeypatch)
  mesh = sharding.make_mesh(layout)
  mine = E // mesh.shape["expert"]
  with sharding.use(layout, mesh):
    run = functools.partial(score, capacity, expert_fn=spy)
    jax.eval_shape(run, *arguments("choices", 0))
  assert seen == [((mine, D, F), (buffer_size, D), (mine,))]


def moves(run, layout):
  """The kind and the entries of every collective, sums apart."""
  found = collectives.read(run.as_text(), sharding.make_mesh(layout))
  return sorted(
    (each.kind, each.bytes // 4) for each in found if each.kind != "all-reduce"
  )


@LAYOUT
def test_tokens_are_gathered_once_and_sums_scattered_back(layout):
  """And of every edge its expert and its gate; no weights, unless split."""
  mesh = sharding.make_mesh(layout)
  n, split = mesh.shape["expert"], mesh.shape["model"] > 1
  groups = n * G // (4 if layout is COPIES else 8)
  tokens, edges = groups * S, groups * S * K
  weights = 2 * [("all-gather", E // n * D * F)] if split else []
  there = [("all-gather", edges), ("all-gather", edges)]
  there += [("all-gather", tokens * D)]
  back_sums = [("reduce-scatter", tokens * D // n)]
  run = on_all_devices(layout, "all_gather", None, "choices", forward=True)
  assert moves(run, layout) == sorted(weights + there + back_sums)
  run = on_all_devices(layout, "all_gather", None, "choices")
  back = [("all-gather", tokens * D), ("reduce-scatter", tokens * D // n)]
  back += [("reduce-scatter", edges // n)]
  assert moves(run, layout) == sorted(weights + there + back_sums + back)


# -- two levels ---------------------------------------------------------------

Q = 3


def two_levels():
  free = {"capacity_factor": None, "eval_capacity_factor": None}
  within = moe.MoE(router.NoisyTopK(Q, K), experts.FeedForward(Q, F), **free)
  return moe.HierarchicalMoE(router.NoisyTopK(E, K), within, S, **free)


def score_of_layer(params, x):
  """The noise is that of one key; all that is decided comes out."""
  y, state = two_levels().apply(
    {"params": params},
    x,
    train=True,
    mask=x[..., 0] > -1,
    rngs={"router": jax.random.key(4)},
    mutable=["routing"],
  )
  aux, _ = losses.auxiliary(state, {"importance": 0.3, "load": 0.7})
  (routing,) = losses.routings(state)
  decided = routing.assignment, routing.load, routing.importance
  real = jnp.where(routing.mask[..., None], routing.logits, 0)
  return (y * jnp.cos(x)).sum() + aux, (y, decided, real)


def to_all(layout, fn):
  """Traces it for devices that send each row to one of their own."""
  mesh = sharding.make_mesh(layout)
  x, module = draw(0)["x"], two_levels()
  boxed = jax.eval_shape(lambda: module.init(jax.random.key(0), x))["params"]
  params = kinds.random_params(module, x)
  there = sharding.shardings(boxed, layout, mesh)
  batch = sharding.batch_sharding(layout, mesh, G)
  args = jax.device_put((params, x), (there, batch))
  with pytest.MonkeyPatch.context() as patch, sharding.use(layout, mesh):
    patch.setattr(sharding, "platform", lambda: "tpu")
    return fn(patch, args)


def run_emulated(patch, args):
  pretend(patch)
  slopes = jax.value_and_grad(score_of_layer, (0, 1), has_aux=True)
  return jax.jit(slopes)(*args)


def test_two_levels_by_all_to_all_are_those_of_one_device():
  """Values, what is decided, and gradients, of noise that is the same."""
  got = to_all(sharding.LAYOUTS["data_expert"], run_emulated)
  params, x = kinds.random_params(two_levels(), draw(0)["x"]), draw(0)["x"]
  slopes = jax.value_and_grad(score_of_layer, (0, 1), has_aux=True)
  want = jax.jit(slopes)(params, x)
  assert (np.asarray(want[0][1][2]) != 0).any()
  close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5)
  jax.tree.map(close, got, want)


def lowered(patch, args):
  slopes = jax.grad(lambda *args: score_of_layer(*args)[0], (0, 1))
  lowered = jax.jit(slopes).trace(*args).lower(lowering_platforms=("tpu",))
  return lowered.as_text()


def test_tokens_travel_to_groups_of_experts_alone():
  """Once for each group, and back; nothing of their size is gathered.

  Of every edge comes back which experts took it and with what gates, and the
  gates' slopes return.
  """
  text = to_all(sharding.LAYOUTS["expert"], lowered)
  of_device, edges, groups = G * S, G * S * K // 8, G // 8
  op = r"(ragged_all_to_all|all_to_all|all_gather)\b.*-> tensor<(\S+)>"
  assert collections.Counter(re.findall(op, text)) == {
    ("ragged_all_to_all", f"{of_device}x{D}xf32"): 2,
    ("ragged_all_to_all", f"{edges}x{D}xf32"): 2,
    ("ragged_all_to_all", f"{edges}x{K}xi32"): 1,
    ("ragged_all_to_all", f"{edges}x{K}xf32"): 1,
    ("ragged_all_to_all", f"{of_device}x{K}xf32"): 1,
    # Which edges they are: their noise depends on it, and their load.
    ("ragged_all_to_all", f"{of_device}x1xi32"): 1,
    ("all_gather", f"{G}xi32"): 1,
    ("all_gather", f"8x{E}xi32"): 1,
    # Load, with its slope.
    ("all_to_all", f"{E}x{groups}x{Q}xf32"): 1,
    ("all_to_all", f"1x{G}x{Q}xf32"): 1,
  }


def layer(kind, num_experts):
  return moe.MoE(
    router.TopK(num_experts, min(K, num_experts)),
    kind,
    group_size=S,
    capacity_factor=None,
    dispatch="ragged",
  )


@pytest.mark.parametrize(
  "kind",
  [
    experts.FeedForward(1, F),
    experts.Identity(E),
    experts.Mixed((experts.Linear(E), experts.Identity(E))),
  ],
  ids=lambda kind: type(kind).__name__,
)
def test_experts_without_an_axis_of_their_own_stay(kind):
  """A single one, those without weights and those of several kinds."""
  module, x = layer(kind, kind.num_experts), draw(0)["x"]
  params = nn.unbox(jax.jit(module.init)(jax.random.key(0), x))
  layout = sharding.LAYOUTS["expert"]

  def loss(params, x):
    return jnp.square(module.apply(params, x, train=True)).sum()

  want = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)
  with sharding.use(layout, sharding.make_mesh(layout)):
    got = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, got, want)
