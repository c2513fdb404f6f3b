"""Layouts compiled ahead of time for the chips of a TPU: what they exchange."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import topology

from moejax import experts, moe, router, sharding
from moejax.planning import collectives, hlo

B, S, D, F, E, Q, K = 8, 64, 256, 2048, 8, 4, 2
# The bytes of the routed tokens that one chip has, in bfloat16.
ROUTED = 2 * K * S * D
NAMES = ("einsum", "gather", "ragged", "hierarchical")
SPLIT = ("expert", "data_expert", "expert_model")
# Two levels, whose secondary mixtures route half of all tokens as one.
TOGETHER = "hierarchical, together"


def layer(name):
  """With as many slots as edges; ragged, without slots."""
  two_levels = "hierarchical" in name
  feed_forward = experts.FeedForward(Q if two_levels else E, F)
  if two_levels:
    within = moe.MoE(router.TopK(Q, K), feed_forward, capacity_factor=1.0)
    return moe.HierarchicalMoE(
      router.TopK(E, K),
      within,
      group_size=S,
      groups_together=B // 2 if name == TOGETHER else 1,
      capacity_factor=1.0,
    )
  return moe.MoE(
    router.TopK(E, K),
    feed_forward,
    group_size=S,
    capacity_factor=None if name == "ragged" else 1.0,
    dispatch=name,
  )


def compiled(layout, module, what, shape=(B, S, D), options=None):
  """The text of a program of a layer in bfloat16, and its mesh."""
  layout = sharding.LAYOUTS[layout]
  mesh = sharding.make_mesh(layout, topology.chips())
  x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  boxed = jax.eval_shape(functools.partial(module.init, jax.random.key(0)), x)
  params, places = nn.unbox(boxed), sharding.shardings(boxed, layout, mesh)
  lies = places, sharding.batch_sharding(layout, mesh, shape[0])
  out = lies if what is gradient else None
  with sharding.use(layout, mesh):
    run = jax.jit(
      functools.partial(what, module), in_shardings=lies, out_shardings=out
    )
    return run.lower(params, x).compile(options).as_text(), mesh


def gradient(module, params, x):
  def loss(params, x):
    y = module.apply(params, x, train=True)
    return jnp.square(y.astype(jnp.float32)).mean()

  return jax.grad(sharding.zero3(loss), (0, 1))(params, x)


def expected(layout, name):
  """Kind, bytes of the result and mesh axes of all that is not small.

  The weights' gradients come in float32 from sorted rows.
  """
  matrix = 2 * E * D * F * (Q if "hierarchical" in name else 1)
  slope = 2 * matrix if name == "ragged" else matrix
  exchanges = 4 * [("all-to-all", ROUTED, ("expert",))]
  copies = 2 * [("all-gather", 2 * ROUTED, ("model",))]
  # The choices of all experts of a group of experts come back, each by itself.
  sums = 2 * ROUTED * (K if "hierarchical" in name else 1)
  copies += 2 * [("all-reduce", sums, ("model",))]
  if name == "ragged":
    # The buffer holds all the tokens of the devices that share the experts.
    exchanges = 2 * [
      ("ragged-all-to-all", each, ("expert",)) for each in (ROUTED, 4 * ROUTED)
    ]
    # The number of rows is not known beforehand; their devices share weights.
    copies = 2 * [("all-gather", matrix // 4, ("model",))]
    copies += 2 * [("reduce-scatter", slope // 8, ("model",))]
  found = {
    "replicated": [("all-reduce", 2 * slope, ("data",))],
    "expert": exchanges,
    "data_expert": [*exchanges, ("all-reduce", 2 * slope // 4, ("data",))],
    "expert_model": exchanges + copies,
    "fsdp": 4 * [("all-gather", matrix, ("data",))]
    + 2 * [("reduce-scatter", slope // 8, ("data",))],
  }
  return sorted(found[layout])


@pytest.mark.parametrize(
  "layout, name",
  [(layout, name) for layout in sharding.LAYOUTS for name in NAMES]
  + [(layout, TOGETHER) for layout in SPLIT],
)
def test_layout_on_chips_sends_tokens_or_weights_and_nothing_else(layout, name):
  """And sums of the router's gradients, and which slots are taken."""
  text, mesh = compiled(layout, layer(name), gradient)
  found = [e for e in collectives.read(text, mesh) if e.bytes >= ROUTED]
  got = sorted((each.kind, each.bytes, each.axes) for each in found)
  want = expected(layout, name)
  assert [each[::2] for each in got] == [each[::2] for each in want]
  # The router's gradient may be sent with another's.
  sizes = pytest.approx([each[1] for each in want], rel=0.01)
  assert [each[1] for each in got] == sizes
  assert {e.dtype for e in found if "all-to-all" in e.kind} <= {"bf16"}


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", ["gather", "ragged"])
def test_of_two_parts_one_travels_while_experts_compute_the_other(name, parts):
  """There and back; of a single part every product waits for its rows."""
  module = moe.MoE(
    router.TopK(64, 4),
    experts.FeedForward(64, 2048),
    group_size=1024,
    capacity_factor=None if name == "ragged" else 1.25,
    dispatch=name,
    exchange_parts=parts,
  )
  # The compiler's default is to wait for an all-to-all of slots.
  options = {"xla_tpu_enable_async_all_to_all": True}
  shape = (64, 1024, 1024)
  text, _ = compiled("expert", module, moe.MoE.apply, shape, options)
  travelling, beside = set(), set()
  for op in (each.op for each in hlo.runs(text) if not each.is_part):
    if op.opcode.endswith("all-to-all-start") and op.bytes > 1e6:
      travelling.add(op.name)
    if op.opcode.endswith("-done"):
      travelling -= {each.name for each in op.operands}
    # Products of experts; those of routers are small.
    is_product = op.name.startswith("gmm") or "kind=kOutput" in op.rest
    if is_product and op.bytes > 1e6:
      beside |= travelling
  assert len(beside) == 2 * (parts - 1)
