"""What training changes, created straight into its sharding."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from moejax import sharding


class TrainState(NamedTuple):
  """Holds no random key: each step's is folded from the seed and the step."""

  step: Int[Array, ""]
  params: Any
  opt_state: Any


def create(
  model: nn.Module,
  tx: optax.GradientTransformation,
  batch: Mapping[str, jax.ShapeDtypeStruct],
  seed: int,
  layout: sharding.Layout,
  mesh: jax.sharding.Mesh,
) -> tuple[TrainState, Any]:
  """Creates the first state, and the shardings of its leaves.

  Parameters and optimiser state come out of one jitted function in their own
  shardings: no device ever holds a full copy of a split array.
  """

  def init():
    zeros = {name: jnp.zeros(a.shape, a.dtype) for name, a in batch.items()}
    params = model.init(jax.random.key(seed), zeros, method="loss")["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))

  with sharding.use(layout, mesh):
    shardings = sharding.shardings(jax.eval_shape(init), layout, mesh)
    state = jax.jit(lambda: nn.unbox(init()), out_shardings=shardings)()
  return state, shardings


def abstract(state: TrainState, shardings: Any) -> TrainState:
  """Shapes, types and shardings, for a restore onto this mesh."""
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=where
    ),
    state,
    shardings,
  )
