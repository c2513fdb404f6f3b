"""Experts: modules that declare weights, and pure functions of them.

A module's `__call__(width)` returns its weights, with axis E in front on every
leaf; `run(weights, rows)` maps each expert's rows. The two are apart so that a
dispatcher can carry the rows, and a mesh the weights, wherever they need be.
"""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

Weights = Mapping[str, Float[Array, "E I O"]]

# Fan-in scaling of each expert's own matrix: the expert axis is no fan.
_INIT = nn.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=0)


def _partitioned(
  num_experts: int, *axes: str | None
) -> nn.initializers.Initializer:
  # A lone expert has no axis to be split along: every device keeps a copy.
  expert = "expert" if num_experts > 1 else None
  return nn.with_logical_partitioning(_INIT, (expert, *axes))


def expert_dot(
  rows: Float[Array, "E N I"], matrices: Float[Array, "E I O"]
) -> Float[Array, "E N O"]:
  """Multiplies each expert's rows by that expert's matrix."""
  return jnp.einsum("ENI,EIO->ENO", rows, matrices.astype(rows.dtype))


class FeedForward(nn.Module):
  """relu(x W_in) W_out, without biases: the paper's experts (sec. 4.1).

  Attributes:
    num_experts: E.
    hidden: width F of the hidden layer.
    activation: after the first product.
  """

  num_experts: int
  hidden: int
  activation: Callable[[Array], Array] = nn.relu

  @nn.compact
  def __call__(self, width: int) -> Weights:
    E, D, F = self.num_experts, width, self.hidden
    w_in = _partitioned(E, "embed", "mlp")
    w_out = _partitioned(E, "mlp", "embed")
    return {
      "w_in": self.param("w_in", w_in, (E, D, F), jnp.float32),
      "w_out": self.param("w_out", w_out, (E, F, D), jnp.float32),
    }

  @nn.nowrap
  def run(
    self, weights: Weights, rows: Float[Array, "E N D"]
  ) -> Float[Array, "E N D"]:
    hidden = self.activation(expert_dot(rows, weights["w_in"]))
    return expert_dot(hidden, weights["w_out"])


class Linear(nn.Module):
  """x W: the experts of the paper's earlier draft (512 x 512 maps)."""

  num_experts: int

  @nn.compact
  def __call__(self, width: int) -> Weights:
    init = _partitioned(self.num_experts, "embed", None)
    shape = (self.num_experts, width, width)
    return {"w": self.param("w", init, shape, jnp.float32)}

  @nn.nowrap
  def run(
    self, weights: Weights, rows: Float[Array, "E N D"]
  ) -> Float[Array, "E N D"]:
    return expert_dot(rows, weights["w"])


EXPERTS = {"feed_forward": FeedForward, "linear": Linear}
