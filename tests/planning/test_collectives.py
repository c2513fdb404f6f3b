"""Collectives as a program's text tells them."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax.planning import collectives
from moejax.planning.collectives import Collective

TEXTS = pathlib.Path(__file__).parent / "texts"
AXES = ("data", "expert", "model")
# float32 [N, D] on each device.
N, D = 24, 6
BYTES = 4 * N * D


def mesh(shape=(2, 2, 2), devices=None):
  devices = np.asarray(jax.devices() if devices is None else devices)
  return jax.sharding.Mesh(devices.reshape(shape), AXES)


def read(fn, over=None):
  """Of fn, of [N, D] on each device of a mesh."""
  over = mesh() if over is None else over
  x = jax.ShapeDtypeStruct((8 * N, D), jnp.float32)
  run = jax.shard_map(
    fn, mesh=over, in_specs=P(AXES), out_specs=P(AXES), check_vma=False
  )
  places = jax.NamedSharding(over, P(AXES))
  compiled = jax.jit(run, in_shardings=places).lower(x).compile()
  return collectives.read(compiled.as_text(), over)


# Each with the bytes of its result and those sent, in a group of n.
KINDS = {
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
  "collective-permute": (
    lambda x, axis: jax.lax.ppermute(x, axis, [(0, 1), (1, 0)]),
    lambda n: (BYTES, BYTES),
  ),
}


@pytest.mark.parametrize("axes", [("data",), ("expert",), ("data", "model")])
def test_each_kind_with_its_bytes_and_axes(axes):
  over = axes[0] if len(axes) == 1 else axes
  # A permutation runs over one axis.
  kinds = [k for k in KINDS if len(axes) == 1 or k != "collective-permute"]

  def one_after_the_other(x):
    for kind in kinds:
      y = 1 + KINDS[kind][0](jnp.tanh(x), over)
      x = jnp.resize(y, x.shape)
    return x

  n = 2 ** len(axes)
  assert read(one_after_the_other) == [
    Collective(kind, "f32", *KINDS[kind][1](n), axes, 1, True) for kind in kinds
  ]


GROUPS = {
  # Devices 0 to 3 are a node and 4 to 7 another: of a row of eight, a device
  # sends 1 of 7 parts to the other by a ring, 4 of 7 where all exchange.
  "{{0,1,2,3,4,5,6,7}}": (1 / 7, 4 / 7),
  "{{0,1,2,3},{4,5,6,7}}": (0, 0),
  "{{0,4},{1,5},{2,6},{3,7}}": (1, 1),
  "[4,2]<=[8]": (0, 0),
  # Two of each node: 1 of 3 parts, and 2.
  "{{0,1,4,5},{2,3,6,7}}": (1 / 3, 2 / 3),
}


@pytest.mark.parametrize("groups", GROUPS)
def test_what_goes_to_other_nodes(groups):
  text = f"""
ENTRY %main (x: f32[840]) -> f32[840] {{
  %x = f32[840]{{0}} parameter(0)
  %r = f32[840]{{0}} all-reduce(%x), replica_groups={groups}, to_apply=%add
  %g = f32[840]{{0}} all-gather(%x), replica_groups={groups}, dimensions={{0}}
  ROOT %a = f32[840]{{0}} all-to-all(%x), replica_groups={groups}
}}
%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}}
"""
  ring, exchange = GROUPS[groups]
  found = collectives.read(text, mesh(), node=4)
  shares = [each.between_bytes / each.wire_bytes for each in found]
  assert shares == pytest.approx([ring, ring, exchange], abs=1e-3)
  # On one node of eight, and where nobody asks.
  for node in (8, None):
    found = collectives.read(text, mesh(), node)
    assert [each.between_bytes for each in found] == [0, 0, 0]
  # By the devices' own numbers, in whatever order the mesh has them.
  mixed = mesh(devices=[jax.devices()[i] for i in (0, 4, 1, 5, 2, 6, 3, 7)])
  if groups == "[4,2]<=[8]":
    assert collectives.read(text, mixed, 4)[0].between_bytes > 0


@pytest.mark.parametrize("pair, share", [("{0,1}", 0), ("{3,4}", 1)])
def test_a_permutation_goes_to_other_nodes_if_a_pair_does(pair, share):
  text = f"""
ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %p = f32[8]{{0}} collective-permute(%x), source_target_pairs={{{pair}}}
}}
"""
  (found,) = collectives.read(text, mesh(), node=4)
  assert found.between_bytes == share * found.wire_bytes > -1


def test_several_arrays_and_smaller_numbers():
  def fn(x):
    eights = jax.lax.all_gather(x.astype(jnp.int8), "model", tiled=True)
    x = x[:2] + eights.astype(jnp.float32)[:2]
    whole, part = jax.lax.psum((jnp.resize(x, (N, D)), x), "data")
    return whole.at[:2].multiply(part)

  small, both = read(fn)
  assert (small.dtype, small.bytes, small.wire_bytes) == (
    "s8",
    2 * N * D,
    N * D,
  )
  assert (both.kind, both.bytes) == ("all-reduce", BYTES + 4 * 2 * D)


def test_loops_count_their_rounds_or_once_and_say_so():
  def step(x, _):
    return 2 * jax.lax.psum(x, "data"), None

  def nested(x, _):
    return jax.lax.scan(step, x, length=3)[0], None

  def fn(x):
    x = jax.lax.scan(nested, x, length=5)[0]
    return jax.lax.while_loop(
      lambda x: x[0, 0] < 100, lambda x: jax.lax.psum(x, "model") + 1, x
    )

  assert [(e.axes[0], e.times, e.is_bounded) for e in read(fn)] == [
    ("data", 15, True),
    ("model", 1, False),
  ]


def program(groups):
  return f"""HloModule jit_f, num_partitions=8

ENTRY %main.1_spmd (param: f32[4,6]) -> f32[8,6] {{
  %param = f32[4,6]{{1,0:T(8,128)S(1)}} parameter(0)
  ROOT %x.1 = f32[8,6]{{1,0:T(8,128)(2,1)}} all-gather(%param), channel_id=1, \
{groups}, use_global_device_ids=true, metadata={{op_name="jit(f)"}}
}}
"""


@pytest.mark.parametrize(
  "groups, axes",
  [
    ("replica_groups={}", AXES),
    ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("model",)),
    ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",)),
    ("replica_groups={{0,5},{1,4},{2,7},{3,6}}", None),
    ("replica_groups=[1,8]<=[8]", AXES),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
    ("replica_groups=[2,4]<=[4,2]T(1,0)", ("data", "expert")),
    ("replica_groups=[4,2]<=[2,2,2]T(2,0,1)", ("expert",)),
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
def test_every_notation_of_groups(groups, axes):
  (found,) = collectives.read(program(groups), mesh())
  assert found.axes == axes
  assert found.bytes == 4 * 8 * 6


def test_programs_of_another_mesh_name_both_numbers():
  small = mesh((2, 2, 1), jax.devices()[:4])
  with pytest.raises(ValueError, match=r"8 devices, but the mesh has 4"):
    collectives.read(program("replica_groups={{0,1,2,3,4,5,6,7}}"), small)


def test_a_device_with_itself_is_no_collective():
  groups = ",".join(f"{{{i}}}" for i in range(8))
  text = program(f"replica_groups={{{groups}}}")
  assert not collectives.read(text, mesh())


def test_starts_and_ends_are_one():
  text = (TEXTS / "tpu_asynchronous.txt").read_text()
  assert collectives.read(text, mesh()) == [
    Collective("all-gather", "bf16", 96, 48, ("model",), 1, True),
    Collective("collective-permute", "bf16", 48, 48, ("model",), 1, True),
  ]


def test_a_sum_of_which_every_device_keeps_a_part():
  """A TPU's reduce-scatter of [8, 6] over two devices."""
  text = (TEXTS / "tpu_reduce_scatter.txt").read_text()
  assert collectives.read(text, mesh()) == [
    Collective("reduce-scatter", "f32", 96, 96, ("model",), 1, True)
  ]
