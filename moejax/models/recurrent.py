"""The recurrent mixture (sec. 3.1): experts in place of an LSTM's matrices.

The paper proposes it and has no experiment. Its router reads what the layer
itself said last, so an expert sees the tokens of one time step at once, and no
more. The remedy that the paper names is to have more rows in memory, by keeping
less of each: the backward pass runs segments of time steps again (1606.03401).

Every dispatch works within the loop. At each time step rows move, where a
layout splits experts, and the gradients of router and bias are summed over the
devices.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax import losses
from moejax import routing as routing_lib
from moejax.models.layers import (
  LSTMState,
  declare,
  forget_one,
  update_cells,
  zero_state,
)
from moejax.moe import ROUTING


class RecurrentMoE(nn.Module):
  """An LSTM whose pre-activations are those of a mixture (sec. 3.1).

  With v = (x_t, y_{t-1}),

    (i, f, g, o) = sum_e G(v)_e E_e(v) + bias,

  and all else is as in `layers.lstm` without a projection. An expert is a
  matrix, without a hidden layer: a single one makes an LSTM, and k of them cost
  as much as k LSTMs.

  The rows of a step are the mixture's tokens; padding is not routed, and the
  noise of a step has a key of its own. The one Routing that the layer reports
  has the groups of all steps, so that balance is that of the whole batch.

  Attributes:
    width: units, and entries of the output, u.
    mixture: called as MoE is, on rows of D + u entries, of which it makes 4u.
      Its groups are of rows: `group_size` divides B, and the groups of one step
      divide over the devices.
    segment: time steps that the backward pass runs again at once. It keeps
      states where segments begin, and all else of one segment; None keeps all
      of all steps.
  """

  width: int
  mixture: nn.Module
  segment: int | None = None

  @nn.compact
  def bias(self) -> Float[Array, "gates"]:
    """Declares what is added to the sums of the mixture: 4u entries."""
    return declare(self, "bias", ("hidden",), (4 * self.width,), forget_one)

  def step(
    self, x: Float[Array, "B D"], state: LSTMState, ids: Int[Array, "B"] | None
  ) -> LSTMState:
    """Takes one step in evaluation; no token is padding."""
    both = jnp.concatenate([x, state.y.astype(x.dtype)], axis=-1)
    z = self.mixture(both, False, ids=ids).astype(jnp.float32)
    c, y, _ = update_cells(z + self.bias()[None], state.c)
    return LSTMState(y, c)

  def __call__(
    self,
    x: Float[Array, "B L D"],
    start: Bool[Array, "B L"],
    *,
    train: bool,
    mask: Bool[Array, "B L"] | None = None,
    ids: Int[Array, "B L"] | None = None,
  ) -> Float[Array, "B L O"]:
    """Runs the layer over packed rows; arguments as for `LSTM` and `MoE`.

    Raises:
      ValueError: the segment does not divide the length of rows, or what `MoE`
        refuses of the rows of one step.
    """
    rows, length, _ = x.shape
    segment = self.segment or length
    if length % segment:
      raise ValueError(
        f"segments of {segment} time steps do not divide rows of {length};"
        " choose a number that does, or None to run no step again."
      )
    bias = self.bias()
    zero = zero_state(rows, self.width, self.width)
    each = jax.tree.map(lambda a: a.swapaxes(0, 1), (x, start, mask, ids))
    if self.is_initializing():
      # It declares its weights; the loop then runs a copy that has them.
      x_0, _, mask_0, ids_0 = jax.tree.map(lambda a: a[0], each)
      both = jnp.concatenate([x_0, zero.y.astype(x.dtype)], axis=-1)
      self.mixture(both, train, mask=mask_0, ids=ids_0)
    mixture, variables = self.mixture.unbind()
    params = {"params": variables.get("params", {})}
    streams = filter(self.has_rng, ("router", "dropout"))
    keys = {name: self.make_rng(name) for name in streams}

    def step(state, now):
      t, (x, start, mask, ids) = now
      keep = 1 - start.astype(jnp.float32)[:, None]
      y, c = state.y * keep, state.c * keep
      # Of the step's number, whatever the segments are.
      rngs = {n: jax.random.fold_in(key, t) for n, key in keys.items()}
      both = jnp.concatenate([x, y.astype(x.dtype)], axis=-1)
      z, sown = mixture.apply(
        params, both, train, mask=mask, ids=ids, rngs=rngs, mutable=[ROUTING]
      )
      c, y, _ = update_cells(z.astype(jnp.float32) + bias[None], c)
      return LSTMState(y, c), (y.astype(x.dtype), losses.routings(sown))

    run = functools.partial(jax.lax.scan, step)
    if self.segment is not None:
      run = jax.checkpoint(run, prevent_cse=False)
    in_segments = jax.tree.map(
      lambda a: a.reshape(-1, segment, *a.shape[1:]),
      (jnp.arange(length), each),
    )
    _, out = jax.lax.scan(run, zero, in_segments)
    y, routings = jax.tree.map(lambda a: a.reshape(length, *a.shape[2:]), out)
    for routing in routings:
      self.mixture.report(routing_lib.stack_microbatches(routing))
    return y.swapaxes(0, 1)
