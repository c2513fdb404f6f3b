"""Rows that go from every device to every other, as many as each has for it."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Num


def ragged_all_to_all(
  rows: Num[Array, "N D"],
  before: Num[Array, "M D"],
  begin: Int[Array, "W"],
  size: Int[Array, "W"],
  begin_there: Int[Array, "W"],
  size_here: Int[Array, "W"],
  axis: str,
) -> Num[Array, "M D"]:
  """Sends slices of rows; `jax.lax.ragged_all_to_all`, also on a CPU.

  Each of n devices along a mesh axis has W / n slices for each, in the order
  of the devices. To be called within `jax.shard_map`. It has a transpose.

  A CPU has no such collective (jax#34755). There all rows go around a ring, and
  every device takes its slices from those that come by: (n - 1) * N rows leave
  a device, where the collective sends the slices alone.

  Args:
    rows: of this device.
    before: what stays where no row arrives.
    begin: where a slice begins in `rows`.
    size: of how many rows it is.
    begin_there: where it begins in the result, on the device that it goes to.
    size_here: of how many rows are the slices that arrive here.
    axis: of the mesh.
  """
  return jax.lax.platform_dependent(
    *(rows, before, begin, size, begin_there, size_here),
    cpu=functools.partial(_around, axis),
    default=functools.partial(jax.lax.ragged_all_to_all, axis_name=axis),
  )


def _around(axis, rows, before, begin, size, begin_there, size_here):
  del size_here
  n, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
  at = jnp.arange(before.shape[0], dtype=jnp.int32)[:, None]
  following = [(i, (i + 1) % n) for i in range(n)]

  def take(result, rows, *slices):
    first, number, to = (each.reshape(n, 1, -1)[me] for each in slices)
    inside = (at >= to) & (at < to + number)
    own = inside.argmax(axis=1)
    found = rows.at[at[:, 0] + (first - to)[0, own]].get(mode="clip")
    return jnp.where(inside.any(axis=1, keepdims=True), found, result)

  def step(carry, _):
    result, passed = carry
    passed = jax.lax.ppermute(passed, axis, following)
    return (take(result, *passed), passed), None

  sent = rows, begin, size, begin_there
  start = take(before, *sent), sent
  return jax.lax.scan(step, start, length=n - 1)[0][0]
