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


def target(
  model: nn.Module,
  tx: optax.GradientTransformation,
  batch: Mapping[str, jax.ShapeDtypeStruct],
  layout: sharding.Layout,
  mesh: jax.sharding.Mesh,
) -> TrainState:
  """Returns the state's shapes, types and shardings; allocates nothing.

  A checkpoint is restored into it, on whatever mesh it was saved.

  Raises:
    ValueError: an axis does not divide by the devices it is split over.
  """
  with sharding.use(layout, mesh):
    boxed = jax.eval_shape(lambda: _init(model, tx, batch, 0))
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=where
    ),
    nn.unbox(boxed),
    sharding.shardings(boxed, layout, mesh),
  )


def create(
  model: nn.Module,
  tx: optax.GradientTransformation,
  batch: Mapping[str, jax.ShapeDtypeStruct],
  seed: int,
  layout: sharding.Layout,
  mesh: jax.sharding.Mesh,
) -> TrainState:
  """Creates the first state.

  Parameters and optimiser state come out of one jitted function in their own
  shardings: no device ever holds a full copy of a split array.
  """
  where = shardings(target(model, tx, batch, layout, mesh))
  with sharding.use(layout, mesh):
    init = jax.jit(
      lambda: sharding.unbox(_init(model, tx, batch, seed)), out_shardings=where
    )
    return init()


def shardings(state: TrainState) -> TrainState:
  """Returns the sharding of every leaf of a state or target."""
  return jax.tree.map(lambda leaf: leaf.sharding, state)


def _init(model, tx, batch, seed):
  zeros = {name: jnp.zeros(a.shape, a.dtype) for name, a in batch.items()}
  params = model.init(jax.random.key(seed), zeros, method="loss")["params"]
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
