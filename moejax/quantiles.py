"""The m-th largest of many numbers, by counting.

It is found bit by bit: every bit asks how many numbers are at least so large.
Where these lie on several devices only the counts travel, and nothing is
sorted.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt

# Of a number's bits.
NUM_BITS = 32


def to_bits(x: Float[Array, "*shape"]) -> UInt[Array, "*shape"]:
  """Maps numbers to whole ones of the same order, none of them below 0."""
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
  # Among negative numbers the larger bits are those of the smaller number.
  sign = jnp.uint32(1 << 31)
  return jnp.where(bits >= sign, ~bits, bits | sign)


def from_bits(bits: UInt[Array, "*shape"]) -> Float[Array, "*shape"]:
  """Inverts `to_bits`."""
  sign = jnp.uint32(1 << 31)
  bits = jnp.where(bits >= sign, bits ^ sign, ~bits)
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def largest(
  holds: Callable[[UInt[Array, "*shape"]], Bool[Array, "*shape"]],
  num_bits: int,
  zeros: UInt[Array, "*shape"],
) -> UInt[Array, "*shape"]:
  """Returns the largest number of so many bits for which it holds, as for 0."""

  def set_bit(i, found):
    bit = jnp.uint32(1) << (num_bits - 1 - i).astype(jnp.uint32)
    more = found | bit
    return jnp.where(holds(more), more, found)

  return jax.lax.fori_loop(0, num_bits, set_bit, zeros)
