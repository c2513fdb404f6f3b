"""The ragged exchange: what loops over devices and slices say, and back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax import exchange

N, M, D = 24, 40, 3


def splits(rng, n, s):
  """Random ones: of [sender, receiver, slice], begins and sizes.

  Slices lie in any order with gaps between them; some are empty.
  """

  def begins(size, room):
    """Of the slices on one device, [other, slice]."""
    flat, order = size.reshape(-1), rng.permutation(size.size)
    gaps = rng.multinomial(
      room - flat.sum(), np.ones(size.size + 1) / 9e9 + 1 / (size.size + 1)
    )
    at = np.cumsum(flat[order] + gaps[:-1]) - flat[order]
    found = np.zeros_like(flat)
    found[order] = at
    return found.reshape(size.shape)

  size = rng.multinomial(N - 4, np.ones(n * s) / (n * s), n).reshape(n, n, s)
  size[rng.random(size.shape) < 0.3] = 0
  # No more than there is room for.
  while (over := size.sum(axis=(0, 2)) > M).any():
    size[:, over] //= 2
  begin = np.stack([begins(size[i], N) for i in range(n)])
  there = [begins(size[:, i], M) for i in range(n)]
  return size, begin, np.stack(there, axis=1)


@pytest.mark.parametrize("n, s", [(8, 1), (4, 3), (2, 8), (1, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_rows_and_their_slopes_go_where_slices_say(n, s, dtype):
  rng = np.random.default_rng(n)
  size, begin, there = splits(rng, n, s)
  assert (size == 0).any() and size.sum() > 0
  rows, before, slope = (
    jnp.asarray(rng.integers(-99, 99, (n, length, D)), dtype)
    for length in (N, M, M)
  )
  # [receiver, sender, slice]
  arrives = size.swapaxes(0, 1)
  mesh = jax.make_mesh(
    (n, 8 // n),
    ("expert", "data"),
    axis_types=(jax.sharding.AxisType.Auto,) * 2,
  )

  @functools.partial(
    jax.shard_map, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")
  )
  def run(rows, before, *parts):
    flat = (part.reshape(-1) for part in parts)
    return exchange.ragged_all_to_all(rows[0], before[0], *flat, "expert")[None]

  parts = tuple(map(jnp.asarray, (begin, size, there, arrives)))
  call = jax.jit(lambda rows, before: run(rows, before, *parts))
  got = call(rows, before)
  want, to_rows, to_before = (np.array(a) for a in (before, rows * 0, slope))
  for i in range(n):
    for j in range(n):
      for k in range(s):
        a, b, c = begin[i, j, k], there[i, j, k], size[i, j, k]
        want[j, b : b + c] = np.asarray(rows)[i, a : a + c]
        to_rows[i, a : a + c] = np.asarray(slope)[j, b : b + c]
        to_before[j, b : b + c] = 0
  np.testing.assert_array_equal(got, want)
  if dtype != "int32":
    back = jax.jit(lambda *args: jax.vjp(call, *args[:2])[1](args[2]))
    got_rows, got_before = back(rows, before, slope)
    np.testing.assert_array_equal(got_rows, to_rows)
    np.testing.assert_array_equal(got_before, to_before)
