"""Collectives as a program's text tells them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import topology
from jax.sharding import PartitionSpec as P

from moejax.planning import collectives
from moejax.planning.collectives import Collective

AXES = ("data", "expert", "model")
ALL = P(AXES)
# float32 [N, D] on each device.
N, D = 24, 6
BYTES = 4 * N * D


def mesh(shape=(2, 2, 2), devices=None):
  devices = np.asarray(jax.devices() if devices is None else devices)
  return jax.sharding.Mesh(devices.reshape(shape), AXES)


def compiled(fn, over, out=ALL):
  """The text of fn, of [N, D] on each device of a mesh."""
  x = jax.ShapeDtypeStruct((8 * N, D), jnp.float32)
  run = jax.shard_map(
    fn, mesh=over, in_specs=ALL, out_specs=out, check_vma=False
  )
  places = jax.NamedSharding(over, ALL)
  return jax.jit(run, in_shardings=places).lower(x).compile().as_text()


def read(fn, over=None):
  over = mesh() if over is None else over
  return collectives.read(compiled(fn, over), over)


def permute(x, axis):
  return jax.lax.ppermute(x, axis, [(0, 1), (1, 0)])


# Each with the bytes of its result and those sent, in a group of n.
MOVES = {
  "all-reduce": (jax.lax.psum, lambda n: (BYTES, 2 * BYTES * (n - 1) // n)),
  "all-gather": (
    functools.partial(jax.lax.all_gather, tiled=True),
    lambda n: (BYTES * n, BYTES * (n - 1)),
  ),
  "reduce-scatter": (
    functools.partial(jax.lax.psum_scatter, tiled=True),
    lambda n: (BYTES // n, BYTES // n * (n - 1)),
  ),
  "all-to-all": (
    functools.partial(
      jax.lax.all_to_all, split_axis=0, concat_axis=0, tiled=True
    ),
    lambda n: (BYTES, BYTES * (n - 1) // n),
  ),
  "collective-permute": (permute, lambda n: (BYTES, BYTES)),
}


@pytest.mark.parametrize("axes", [("data",), ("expert",), ("data", "model")])
@pytest.mark.parametrize("kind", MOVES)
def test_each_kind_with_its_bytes_and_axes(kind, axes):
  move, sizes = MOVES[kind]
  if kind == "collective-permute" and len(axes) > 1:
    pytest.skip("runs over one axis")
  over = axes[0] if len(axes) == 1 else axes
  (found,) = read(lambda x: 1 + move(2 * x, over))
  want = Collective(kind, "f32", *sizes(2 ** len(axes)), axes, 1, True)
  assert found == want


def test_several_arrays_and_smaller_numbers():
  def fn(x):
    half = jax.lax.all_gather(x.astype(jnp.int8), "model", tiled=True)
    return x[:2] + half.astype(jnp.float32)[:2]

  (found,) = read(fn)
  assert (found.dtype, found.bytes, found.wire_bytes) == (
    "s8",
    2 * N * D,
    N * D,
  )

  def both(x):
    whole, part = jax.lax.psum((x, x[:2]), "data")
    return whole.at[:2].multiply(part)

  (found,) = read(both)
  assert (found.kind, found.bytes) == ("all-reduce", BYTES + 4 * 2 * D)


def test_a_loop_counts_as_often_as_it_goes_round():
  def step(x, _):
    return 2 * jax.lax.psum(x, "data"), None

  def nested(x, _):
    return jax.lax.scan(step, x, length=3)[0], None

  (found,) = read(lambda x: jax.lax.scan(nested, x, length=5)[0])
  assert (found.times, found.is_bounded) == (15, True)


def test_a_loop_of_unknown_length_counts_once_and_says_so():
  def go_on(x):
    return x[0, 0] < 100

  (found,) = read(
    lambda x: jax.lax.while_loop(
      go_on, lambda x: jax.lax.psum(x, "data") + 1, x
    )
  )
  assert (found.times, found.is_bounded) == (1, False)


def program(groups, *, opcode="all-gather", result="f32[8,6]", more=""):
  return f"""HloModule jit_f, num_partitions=8

ENTRY %main.1_spmd (param: f32[4,6]) -> {result} {{
  %param = f32[4,6]{{1,0:T(8,128)S(1)}} parameter(0)
  ROOT %x.1 = {result}{{1,0:T(8,128)(2,1)}} {opcode}(%param), channel_id=1, \
{groups}, use_global_device_ids=true, metadata={{op_name="jit(f)"}}{more}
}}
"""


@pytest.mark.parametrize(
  "groups, axes",
  [
    ("replica_groups={}", AXES),
    ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("model",)),
    ("replica_groups={{1,0},{6,7},{3,2},{5,4}}", ("model",)),
    ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",)),
    ("replica_groups={{0,5},{1,4},{2,7},{3,6}}", None),
    ("replica_groups=[1,8]<=[8]", AXES),
    ("replica_groups=[2,4]<=[8]", ("expert", "model")),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
    ("replica_groups=[2,4]<=[4,2]T(1,0)", ("data", "expert")),
    ("replica_groups=[4,2]<=[2,2,2]T(2,0,1)", ("expert",)),
    ("replica_groups=mesh['a'=8] {'a'}", AXES),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}", ("data",)),
    ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ("data", "model")),
    ("replica_groups=mesh['a'=8] {'a':(2)2}", ("expert",)),
    ("replica_groups=mesh['a'=4,'b'=2] {'a':(1)2,'b'}", ("data", "model")),
    (
      "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}",
      ("data",),
    ),
    (
      "replica_groups=mesh['a'=4,'b'=2], device_ids=(0,2,1,3,4,6,5,7) {'b'}",
      ("expert",),
    ),
  ],
)
def test_every_way_to_write_groups(groups, axes):
  (found,) = collectives.read(program(groups), mesh())
  assert found.axes == axes
  assert found.bytes == 4 * 8 * 6


def test_programs_of_another_mesh_name_both_numbers():
  text = program("replica_groups={{0,1,2,3,4,5,6,7}}")
  small = mesh((2, 2, 1), jax.devices()[:4])
  with pytest.raises(ValueError, match=r"8 devices, but the mesh has 4"):
    collectives.read(text, small)


ASYNCHRONOUS = """HloModule jit_f, num_partitions=8

ENTRY %main.1_spmd (param: bf16[4,6]) -> bf16[8,6] {
  %param = bf16[4,6]{1,0} parameter(0)
  %ag = (bf16[4,6]{1,0}, bf16[8,6]{1,0}) all-gather-start(%param), \
channel_id=1, replica_groups=[4,2]<=[8], dimensions={0}
  %cp = (bf16[4,6]{1,0}, bf16[4,6]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%param), source_target_pairs={{0,1},{1,0}}
  %cpd = bf16[4,6]{1,0} collective-permute-done(%cp)
  ROOT %agd = bf16[8,6]{1,0} all-gather-done(%ag)
}
"""


def test_starts_and_ends_are_one():
  gather, permute = collectives.read(ASYNCHRONOUS, mesh())
  assert gather == Collective("all-gather", "bf16", 96, 48, ("model",), 1, True)
  assert permute[:4] == ("collective-permute", "bf16", 48, 48)
  assert permute.axes == ("model",)


def test_what_a_tpu_makes_of_split_parameters():
  """Gathers spread over several fusions, and sums that stay in parts."""
  over = mesh((8, 1, 1), topology.chips())
  D, layers = 1024, 4

  def loss(w, x):
    for each in w:
      whole = jax.lax.with_sharding_constraint(each, P())
      x = x + jnp.tanh(x @ whole)
    return jnp.square(x).sum()

  parts = jax.NamedSharding(over, P("data"))
  w = (jax.ShapeDtypeStruct((D, D), jnp.float32, sharding=parts),) * layers
  x = jax.ShapeDtypeStruct((8 * D, D), jnp.float32, sharding=parts)
  with jax.set_mesh(over):
    run = jax.jit(jax.grad(loss), out_shardings=(parts,) * layers)
    text = run.lower(w, x).compile().as_text()
  found = collectives.read(text, over)
  assert re.search(r'chain_id="\d+"', text)
  by_kind = {}
  for each in found:
    assert each.axes == ("data",) and each.is_bounded
    by_kind[each.kind] = by_kind.get(each.kind, 0) + each.times * each.bytes
  assert set(by_kind) == {"all-gather", "reduce-scatter"}
  # Every matrix once, in either precision; every sum once.
  assert by_kind["all-gather"] in [b * layers * D * D for b in (2, 4)]
  assert by_kind["reduce-scatter"] == 4 * layers * D * D // 8


def test_rows_that_travel_by_number():
  over = mesh((2, 4, 1), topology.chips())

  def fn(x):
    room = jnp.zeros((4 * N, D), jnp.float32)
    six = jnp.full(4, N // 4, jnp.int32)
    start = jnp.arange(4, dtype=jnp.int32) * (N // 4)
    return jax.lax.ragged_all_to_all(
      x, room, start, six, start, six, axis_name="expert"
    )

  (found,) = [
    each for each in read(fn, over) if each.kind == "ragged-all-to-all"
  ]
  assert (found.axes, found.times) == (("expert",), 1)
  assert found.bytes >= 4 * BYTES
  assert found.wire_bytes < found.bytes / 4
