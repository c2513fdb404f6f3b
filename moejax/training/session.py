"""An experiment on devices: shapes, and the training step compiled of them.

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
  """An experiment on devices.

  Attributes:
    model: for the vocabulary.
    batch_sharding: where a batch lies.
    shapes: of a batch's arrays.
    abstract_state: shapes, types and shardings of what training changes.
  """

  experiment: config_lib.Experiment
  model: nn.Module
  tx: optim.Update
  layout: sharding.Layout
  mesh: jax.sharding.Mesh
  batch_sharding: jax.sharding.Sharding
  shapes: Mapping[str, jax.ShapeDtypeStruct]
  abstract_state: state.TrainState


def build(
  experiment: config_lib.Experiment,
  vocab_size: int,
  devices: Sequence[jax.Device] | None = None,
) -> Session:
  """Lays an experiment over devices, which need not be there.

  Raises:
    ValueError: a value that cannot be used, or that does not divide over the
      devices, or a process would need rows that another reads.
  """
  model, tx = experiment.model(vocab_size), experiment.tx
  layout, shapes = experiment.layout, experiment.shapes
  batch_size = experiment.batch_size
  mesh = sharding.make_mesh(layout, devices)
  batch_sharding = sharding.batch_sharding(layout, mesh, batch_size)
  count = jax.process_count()
  first, size = jax.process_index(), batch_size // count
  own = batch_sharding.addressable_devices_indices_map((batch_size,))
  for (rows,) in own.values():
    start, stop, _ = rows.indices(batch_size)
    if not first * size <= start <= stop <= (first + 1) * size:
      raise ValueError(
        f"layout {layout.name!r} wants rows {start} to {stop} of a batch of"
        f" {batch_size} on a device of process {first}, but each of the {count}"
        f" processes reads {size} rows, one after the other; let the rule of"
        " 'batch' split rows over the devices of all processes."
      )
  abstract = state.abstract_state(model, tx, shapes, layout, mesh)
  return Session(
    experiment, model, tx, layout, mesh, batch_sharding, shapes, abstract
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


def lower(session: Session) -> jax.stages.Lowered:
  """Lowers the step (state, batch, votes) -> (state, metrics).

  The first argument is donated. The votes are those of `processes.vote`, which
  the step brings together in the metric "asked".
  """
  experiment = session.experiment

  def run(current, batch, asked):
    current, measured = step.train_step(
      current,
      batch,
      model=session.model,
      tx=session.tx,
      aux_weights=experiment.aux_weights,
      aux_scope=experiment.aux_scope,
      seed=experiment.seed,
      microbatches=experiment.train.microbatches,
      balance_over=experiment.train.balance_over,
    )
    return current, measured | {"asked": asked.max()}

  step_fn = jax.jit(
    run,
    out_shardings=(state.shardings(session.abstract_state), None),
    donate_argnums=0,
  )
  batch = {
    name: jax.ShapeDtypeStruct(
      a.shape, a.dtype, sharding=session.batch_sharding
    )
    for name, a in session.shapes.items()
  }
  votes = processes.votes(session.mesh)
  with sharding.use(session.layout, session.mesh):
    return step_fn.lower(session.abstract_state, batch, votes)


def compiled(session: Session) -> jax.stages.Compiled:
  """Compiles the step of `lower`; refuses one that a device has no room for.

  Raises:
    ValueError: names the bytes that a step needs of a device, and those there
      are.
  """
  what = "a step takes"
  try:
    step_fn = lower(session).compile()
  except jax.errors.JaxRuntimeError as error:
    refused = out_of_memory(str(error))
    if refused is None:
      raise
    needs, has = refused
  else:
    has = state.device_memory(session.mesh.local_devices[0])
    beside = bytes_beside(session)
    needs = bytes_needed(step_fn) + beside
    if beside:
      what = "a step, and the state before it that is being saved, take"
    if needs <= has:
      return step_fn
  least = state.with_gradients(session.abstract_state)
  raise ValueError(
    f"{what} {needs:,} bytes of each device in layout"
    f" {session.layout.name!r}, which has {has:,}, though parameters, gradients"
    f" and optimizer state take only {least:,};"
    " take more config.train.microbatches, which are"
    f" {session.experiment.train.microbatches}, or look by `moejax plan` for a"
    " layout that fits."
  )


def bytes_needed(step_fn: jax.stages.Compiled) -> int:
  """Returns what a program takes of one device, at the peak."""
  about = step_fn.memory_analysis()
  results = about.output_size_in_bytes - about.alias_size_in_bytes
  return about.argument_size_in_bytes + results + about.temp_size_in_bytes


def bytes_beside(session: Session) -> int:
  """Returns what the state before a step takes of one device in it."""
  # While it is being saved it stays there; elsewhere it is copied away first.
  on_host = session.mesh.local_devices[0].platform == "cpu"
  return state.bytes_per_device(session.abstract_state) if on_host else 0


def out_of_memory(message: str) -> tuple[int, int] | None:
  """Reads the bytes needed, and those there are, from a TPU compiler's report.

  None where it reports something else.
  """
  found = re.search(
    r"([\d.]+)([KMGT]?)\)? (?:of|exceeds available HBM) \(?([\d.]+)([KMGT]?)",
    message,
  )
  if "RESOURCE_EXHAUSTED" not in message or found is None:
    return None
  units = {unit: 1024**i for i, unit in enumerate(("", *"KMGT"))}
  needs, unit, has, other = found.groups()
  return int(float(needs) * units[unit]), int(float(has) * units[other])
