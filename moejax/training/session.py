"""An experiment on devices: shapes, and the training step compiled of them.

Training runs the program, planning only looks at it: nothing is allocated.
"""

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax

from moejax import config as config_lib
from moejax import sharding
from moejax.training import optim, processes, state, step


class Session(NamedTuple):
  """An experiment on devices."""

  experiment: config_lib.Experiment
  model: nn.Module  # For the vocabulary.
  tx: optim.Update
  layout: sharding.Layout
  mesh: jax.sharding.Mesh
  batch_sharding: jax.sharding.Sharding  # Where a batch lies.
  shapes: Mapping[str, jax.ShapeDtypeStruct]  # Of a batch's arrays.
  # Shapes, types and shardings of what training changes.
  abstract_state: state.TrainState


def build(
  experiment: config_lib.Experiment,
  vocab_size: int,
  devices: Sequence[jax.Device] | None = None,
) -> Session:
  """Lays an experiment over devices, which need not be there.

  ValueError for a value that cannot be used or does not divide over the
  devices, or where a process would need rows that another reads.
  """
  model, tx = experiment.model(vocab_size), experiment.tx
  layout, shapes = experiment.layout, experiment.shapes
  batch_size = experiment.batch_size
  mesh = sharding.make_mesh(layout, devices)
  batch_sharding = sharding.batch_sharding(layout, mesh, batch_size)
  count, here = jax.process_count(), jax.process_index()
  size = batch_size // count
  own = batch_sharding.addressable_devices_indices_map((batch_size,))
  for (rows,) in own.values():
    start, stop, _ = rows.indices(batch_size)
    if not here * size <= start <= stop <= (here + 1) * size:
      raise ValueError(
        f"layout {layout.name!r} wants rows {start} to {stop} of a batch of"
        f" {batch_size} on a device of process {here}, but each of the {count}"
        f" processes reads {size} rows, one after the other; let the rule of"
        " 'batch' split rows over the devices of all processes."
      )
  abstract = state.abstract_state(model, tx, shapes, layout, mesh)
  return Session(
    experiment, model, tx, layout, mesh, batch_sharding, shapes, abstract
  )


def check_fits(session: Session) -> None:
  """Refuses a state that a device cannot hold, activations left aside.

  The ValueError names the bytes that it takes with gradients, those that the
  device has, and the layouts that would fit, with more devices if need be.
  """
  abstract, mesh = session.abstract_state, session.mesh
  has = state.device_memory(mesh.local_devices[0])
  needs = state.with_gradients(abstract)
  if needs <= has:
    return
  # Double the devices until some layouts fit, or until it is of no help.
  layouts = {**sharding.LAYOUTS, session.layout.name: session.layout}
  count, least, before = mesh.size, math.inf, math.inf
  while True:
    takes = {}
    for name, layout in layouts.items():
      # One that these devices, or the model, do not divide.
      with contextlib.suppress(ValueError):
        there = layout, sharding.abstract_mesh(layout, count)
        takes[name] = state.with_gradients(
          state.abstract_state(
            session.model, session.tx, session.shapes, *there
          )
        )
    least = min(takes.values(), default=math.inf)
    if least <= has or least >= before:
      break
    before = least
    # Fewer could not do, if all were split.
    count *= 2 ** math.ceil(math.log2(least / has))
  fits = " or ".join(repr(name) for name in takes if takes[name] <= has)
  if fits and count == mesh.size:
    advice = f"config.layout {fits} would fit"
  else:
    ways = [f"{count}, on which config.layout {fits} would fit"] if fits else []
    ways.append("a smaller model")
    of_experts = [
      state.bytes_per_device(
        [a for p, a in leaves if "experts" in jax.tree_util.keystr(p)]
      )
      for leaves in map(jax.tree.leaves_with_path, abstract[1:])
    ]
    if of_experts[1] > of_experts[0]:
      ways.append("config.optimizer.kind 'factored_adam'")
    here = f"no layout fits on {mesh.size} device(s)"
    advice = f"{here}; take {', or '.join(ways)}"
  raise ValueError(
    f"parameters, gradients and optimizer state take {needs:,} bytes of each"
    f" device in layout {session.layout.name!r}, which has {has:,}; {advice}."
  )


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

  abstract = session.abstract_state
  # Counts of experts too are to be had on every process.
  whole = sharding.whole_sharding(session.mesh)
  step_fn = jax.jit(
    run, out_shardings=(state.shardings(abstract), whole), donate_argnums=0
  )
  rows = session.batch_sharding
  batch = {
    name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rows)
    for name, a in session.shapes.items()
  }
  with sharding.use(session.layout, session.mesh):
    return step_fn.lower(abstract, batch, processes.votes(session.mesh))


def compiled(session: Session) -> jax.stages.Compiled:
  """Compiles the step of `lower`; refuses one that a device has no room for.

  The ValueError names the bytes that a step needs, and those there are.
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
