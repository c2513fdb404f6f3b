"""The paper's optimiser: Adam on a linear, constant, 1/sqrt schedule."""

import math

import jax.numpy as jnp
import optax

Schedule = optax.Schedule
Update = optax.GradientTransformation


def warmup_rsqrt(
  peak: float, warmup_steps: int, hold_steps: int = 0
) -> Schedule:
  r"""Linear for w steps, constant for h, then 1/sqrt; continuous (app. C, E).

  .. math:: lr(t) = peak \cdot \min(t / w,\; 1,\; \sqrt{(w + h) / t})

  with t = count + 1, so that the first update (count 0) is not wasted.

  Args:
    peak: the largest learning rate.
    warmup_steps: w, at least 1; 1000 for the paper's language models.
    hold_steps: h; 0 for the language models, 8000 for translation.

  Raises:
    ValueError: no positive peak, no warm-up step, or a negative hold.
  """
  if not 0 < peak < math.inf:
    raise ValueError(f"peak = {peak}; choose a learning rate above 0.")
  if warmup_steps < 1 or hold_steps < 0:
    raise ValueError(
      f"warmup_steps = {warmup_steps} and hold_steps = {hold_steps}; choose"
      " at least 1 and at least 0."
    )

  def schedule(count):
    t = jnp.asarray(count, jnp.float32) + 1
    decay = math.sqrt(warmup_steps + hold_steps) / jnp.sqrt(t)
    return peak * jnp.minimum(jnp.minimum(t / warmup_steps, 1), decay)

  return schedule


def adam(
  schedule: Schedule,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  clip_norm: float | None = None,
) -> Update:
  """Adam, after clipping the whole gradient's norm if `clip_norm` is given.

  The norm is over the logical arrays, wherever their parts lie: experts and
  dense layers are clipped alike on every mesh.
  """
  update = optax.adam(schedule, b1, b2, eps)
  if clip_norm is None:
    return update
  return optax.chain(optax.clip_by_global_norm(clip_norm), update)
