"""Programs compiled for GPUs that are not there; by hand, and as for a CPU."""

import functools

import config_shapes
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import topology

from moejax import config as config_lib
from moejax import experts, moe, router, sharding
from moejax.planning import chips, collectives, plan, work
from moejax.training import cost

pytestmark = pytest.mark.usefixtures("standard_promotion")
D, F, TOKENS = 256, 1024, 4096


def compiled(where, module, tokens, layout="expert"):
  """The gradient of a layer in float32, as a CPU sends, and its mesh."""
  layout = sharding.LAYOUTS[layout]
  mesh = sharding.make_mesh(layout, where.devices)
  x = jax.ShapeDtypeStruct((8, tokens // 8, D), jnp.float32)
  boxed = jax.eval_shape(functools.partial(module.init, jax.random.key(0)), x)
  params, places = nn.unbox(boxed), sharding.shardings(boxed, layout, mesh)
  batch = sharding.batch_sharding(layout, mesh, 8)

  def loss(params, x):
    y = module.apply(params, x, train=True)
    return jnp.square(y).mean()

  with sharding.use(layout, mesh):
    run = jax.jit(
      jax.grad(sharding.zero3(loss), (0, 1)),
      in_shardings=(places, batch),
      out_shardings=(places, batch),
    )
    return run.lower(params, x).compile(dict(where.options)), mesh


def test_products_of_a_dense_layer_are_counted_exactly():
  """Two forward, two for weights, and two for inputs; shared by eight."""
  where = topology.gpus("h100:8")
  layer = moe.MoE(router.Single(1), experts.FeedForward(1, F))
  program, _ = compiled(where, layer, TOKENS)
  done = work.instructions(program.as_text())
  assert 8 * sum(each.flops for each in done) == 3 * 2 * 2 * TOKENS * D * F


@pytest.mark.parametrize("name", ["h100:8", "b200:2x4"])
def test_an_expert_layout_exchanges_tokens_as_on_a_cpu(name):
  layer = moe.MoE(
    router.TopK(8, 2),
    experts.FeedForward(8, F),
    group_size=TOKENS // 8,
    capacity_factor=1.0,
    dispatch="gather",
  )
  sent = []
  for where in (topology.gpus(name), chips.find("cpu:8")):
    program, mesh = compiled(where, layer, TOKENS)
    found = collectives.read(program.as_text(), mesh, where.node)
    sent.append([e for e in found if e.kind == "all-to-all"])
  ours, theirs = ([(e.bytes, e.wire_bytes) for e in each] for each in sent)
  assert sorted(ours) == sorted(theirs) and len(ours) == 4
  # Of two nodes of four: 4 of the 7 parts that a device sends.
  share = {"h100:8": 0, "b200:2x4": 4 / 7}[name]
  for each in sent[0]:
    assert each.between_bytes == pytest.approx(share * each.wire_bytes, abs=1)


def test_kernels_of_a_loop_count_as_often_as_it_runs():
  """Each round a product with its sine, at least, and a longer loop only that.

  The kernels of a round are the same, however many rounds there are.
  """
  where = topology.gpus("h100:1")
  one = jax.sharding.SingleDeviceSharding(where.devices[0])
  x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=one)

  def done(rounds):
    def fn(x, w):
      return jax.lax.fori_loop(0, rounds, lambda _, c: jnp.sin(c @ w), x)

    text = jax.jit(fn).lower(x, x).compile(dict(where.options)).as_text()
    found = list(work.instructions(text))
    assert sum(each.flops for each in found) == rounds * 2 * 64**3
    return sum(each.launches for each in found)

  five, ten, fifteen = map(done, (5, 10, 15))
  assert ten - five == fifteen - ten
  assert (ten - five) % 5 == 0 and ten - five >= 2 * 5


def test_a_step_for_nodes_of_gpus():
  where = topology.gpus("h100:2x4")
  config = config_shapes.experiment("tiny")
  got = plan.make(config, 1000, where)
  needed = 6 * cost.count(config, 1000).ops
  assert needed > 0 and got.devices == 8 and got.layout == "expert"
  assert got.memory.has == 80e9 and got.memory.fits and got.is_bounded
  # The state is a large part of what so small a model needs.
  assert sum(got.memory[:2]) < got.memory.needs < 10e6
  assert got.flops == pytest.approx(got.model_flops, rel=0.2)
  assert got.launches > 32 and got.estimate.bound == "launches"
  assert got.estimate.launches > 1e-6 * got.launches
  tokens = [e for e in got.collectives if e.kind == "all-to-all"]
  assert len(tokens) == 4
  assert all(0 < each.between_bytes < each.wire_bytes for each in tokens)


def test_a_step_of_the_papers_model_starts_few_kernels():
  """Two LSTMs of 128 steps: a product and what follows, there and back."""
  where = topology.gpus("h100:1")
  fields = {"data__batch_size": 64, "train__microbatches": 1}
  fields["model__moe__group_size"] = 64 * 128
  config = config_shapes.experiment("lm1b/moe_256", **fields)
  got = plan.make(config, config_lib.vocab_size(config), where)
  assert got.is_bounded and 4 * 2 * 128 < got.launches < 2000
