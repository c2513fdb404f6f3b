"""What a config describes, on devices: shapes, and the step compiled of them.

Training runs the program, planning only looks at it: nothing is allocated.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from moejax import config as config_lib
from moejax import sharding
from moejax.training import optim, processes, state, step


class Session(NamedTuple):
  """What a config describes, on devices.

  Attributes:
    model: for the vocabulary.
    schedule: of the learning rate.
    tx: the update rule.
    layout: where arrays lie.
    mesh: of the devices.
    where: a batch lies.
    shapes: of a batch's arrays.
    abstract_state: shapes, types and shardings of what training changes.
  """

  model: nn.Module
  schedule: optim.Schedule
  tx: optim.Update
  layout: sharding.Layout
  mesh: jax.sharding.Mesh
  where: jax.sharding.Sharding
  shapes: Mapping[str, jax.ShapeDtypeStruct]
  abstract_state: state.TrainState


def build(
  config: config_lib.Config,
  vocab_size: int,
  devices: Sequence[jax.Device] | None = None,
) -> Session:
  """Builds what a config describes.

  Args:
    config: plain values, see configs/.
    vocab_size: words of the vocabulary.
    devices: those at hand by default; they need not be there at all.

  Raises:
    ValueError: a value that cannot be used, or that does not divide over the
      devices.
  """
  model = config_lib.model(config, vocab_size)
  schedule, tx = config_lib.optimizer(config)
  layout = config_lib.layout(config)
  mesh = sharding.make_mesh(layout, devices)
  where = sharding.batch_sharding(layout, mesh, config.data.batch_size)
  _check_own_rows(where, config.data.batch_size, layout)
  shapes = config_lib.batch_shapes(config)
  abstract = state.abstract_state(model, tx, shapes, layout, mesh)
  return Session(model, schedule, tx, layout, mesh, where, shapes, abstract)


def _check_own_rows(
  where: jax.sharding.Sharding, batch_size: int, layout: sharding.Layout
) -> None:
  """Refuses a layout in which a process would need rows that another reads."""
  count, own = jax.process_count(), where.addressable_devices_indices_map
  first, size = jax.process_index(), batch_size // count
  for (rows,) in own((batch_size,)).values():
    start, stop, _ = rows.indices(batch_size)
    if not first * size <= start <= stop <= (first + 1) * size:
      raise ValueError(
        f"layout {layout.name!r} wants rows {start} to {stop} of a batch of"
        f" {batch_size} on a device of process {first}, but each of the {count}"
        f" processes reads {size} rows, one after the other; let the rule of"
        " 'batch' split rows over the devices of all processes."
      )


def sizes(params: Any) -> tuple[int, int]:
  """Returns the number of all parameters, and without embedding and softmax.

  The latter is the paper's number, but for biases.
  """

  def size(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

  outer = "embed", "head"
  inner = {n: p for n, p in params.items() if not n.startswith(outer)}
  return size(params), size(inner)


def compiled(config: config_lib.Config, parts: Session) -> jax.stages.Compiled:
  """Compiles the step of `lower`; refuses one that a device has no room for.

  Raises:
    ValueError: names the bytes that a step needs of a device, and those there
      are.
  """
  what = "a step takes"
  try:
    step_fn = lower(config, parts).compile()
  except jax.errors.JaxRuntimeError as error:
    refused = out_of_memory(str(error))
    if refused is None:
      raise
    needs, has = refused
  else:
    has = state.device_memory(parts.mesh.local_devices[0])
    beside = bytes_beside(parts)
    needs = bytes_needed(step_fn) + beside
    if beside:
      what = "a step, and the state before it that is being saved, take"
    if needs <= has:
      return step_fn
  least = state.with_gradients(parts.abstract_state)
  raise ValueError(
    f"{what} {needs:,} bytes of each device in layout"
    f" {parts.layout.name!r}, which has {has:,}, though parameters, gradients"
    f" and optimiser state take only {least:,};"
    " take more config.train.microbatches, which are"
    f" {config.train.get('microbatches', 1)}, or look by `moejax plan` for a"
    " layout that fits."
  )


def bytes_needed(step_fn: jax.stages.Compiled) -> int:
  """Returns what a program takes of one device, at the peak."""
  about = step_fn.memory_analysis()
  results = about.output_size_in_bytes - about.alias_size_in_bytes
  return about.argument_size_in_bytes + results + about.temp_size_in_bytes


def bytes_beside(parts: Session) -> int:
  """Returns what the state before a step takes of one device in it.

  While that is being saved it stays where it is on a CPU; elsewhere it is
  copied away first.
  """
  on_host = parts.mesh.local_devices[0].platform == "cpu"
  return state.bytes_per_device(parts.abstract_state) if on_host else 0


def out_of_memory(message: str) -> tuple[int, int] | None:
  """Reads the bytes needed and those there are from the compiler's report.

  None where it reports something else. A TPU's compiler refuses a program that
  has no room.
  """
  found = re.search(
    r"([\d.]+)([KMGT]?)\)? (?:of|exceeds available HBM) \(?([\d.]+)([KMGT]?)",
    message,
  )
  if "RESOURCE_EXHAUSTED" not in message or found is None:
    return None
  needs, unit, has, other = found.groups()
  return int(float(needs) * _UNITS[unit]), int(float(has) * _UNITS[other])


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def lower(config: config_lib.Config, parts: Session) -> jax.stages.Lowered:
  """Lowers the step (state, batch, votes) -> (state, metrics).

  The first argument is donated. The votes are those of `processes.vote`, which
  the step brings together in the metric "asked".
  """
  aux_weights, aux_scope = config_lib.aux(config)
  options = config_lib.train(config)

  def run(current, batch, asked):
    current, measured = step.train_step(
      current,
      batch,
      model=parts.model,
      tx=parts.tx,
      aux_weights=aux_weights,
      aux_scope=aux_scope,
      seed=config.seed,
      microbatches=options.microbatches,
      balance_over=options.balance_over,
    )
    return current, measured | {"asked": asked.max()}

  step_fn = jax.jit(
    run,
    out_shardings=(state.shardings(parts.abstract_state), None),
    donate_argnums=0,
  )
  batch = {
    name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=parts.where)
    for name, a in parts.shapes.items()
  }
  with sharding.use(parts.layout, parts.mesh):
    return step_fn.lower(
      parts.abstract_state, batch, processes.votes(parts.mesh)
    )
