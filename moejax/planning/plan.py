"""What a layout costs: the real training step, compiled for devices elsewhere.

Only shapes go in: no array of the model is ever made.
"""

import math
import pathlib
import statistics
import tempfile
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from moejax import config as config_lib
from moejax import sharding
from moejax.planning import collectives, work
from moejax.planning import load as load_lib
from moejax.planning.chips import Topology
from moejax.planning.estimate import Estimate, estimate
from moejax.training import cost, processes, session, state, step

REPEATS = 3


class Memory(NamedTuple):
  """Bytes of one device while a step runs."""

  parameters: int  # Its part of them.
  optimizer: int  # Its part of the optimizer's state.
  # Batch, gradients, activations, and whatever else is in between; on a CPU at
  # hand also the state before the step, while that is being saved.
  rest: int
  has: int | None  # What there is; None where that is unknown.

  @property
  def needs(self) -> int:
    """In all, at the peak."""
    return self.parameters + self.optimizer + self.rest

  @property
  def fits(self) -> bool:
    """Whether it fits, as far as is known."""
    return self.has is None or self.needs <= self.has


class Plan(NamedTuple):
  """What one layout costs on one topology."""

  topology: str  # Its name.
  layout: str  # Its name.
  # What differs from the config, as the command line takes it.
  changes: dict[str, Any]
  devices: int  # How many.
  inner: int  # Parameters outside embedding and softmax, the paper's number.
  parameters: int  # All of them, vectors too.
  memory: Memory  # Of one device.
  model_flops: float  # Of one device in a step, by `cost.flops_per_word`.
  experts_share: float  # The experts' part of them.
  ops_per_io: float | None  # As of `cost.Count`.
  flops: int  # Of one device in a step, of the compiled program.
  bytes: int  # That it reads from its memory and writes to it.
  launches: int | None  # Kernels that it starts; None where it is no GPU.
  # Whether the lengths of all loops are known; else FLOPs, collectives and
  # estimate are the least there may be.
  is_bounded: bool
  collectives: list[collectives.Collective]  # Those of a step.
  estimate: Estimate | None  # Of a step; None where the chip is unknown.
  words: int  # Positions for words in a step.
  compile_seconds: float  # How long compiling took here.
  peak_flops: float | None  # Of one chip; None where it is unknown.
  measured: float | None  # Seconds of a step that ran; None where none did.
  # The load of the busiest device over the mean, where rows are sorted; then
  # FLOPs, collectives and estimate are that device's.
  busiest: float = 1.0
  # The part of the memory for sorted rows that these fill; None without any.
  filled: float | None = None

  @property
  def words_per_second(self) -> float | None:
    """If the estimate held."""
    return self.words / self.estimate.seconds if self.estimate else None

  @property
  def utilization(self) -> float | None:
    """The model's own FLOPs over those the chip could do meanwhile."""
    if self.estimate is None:
      return None
    return self.model_flops / (self.peak_flops * self.estimate.seconds)

  @property
  def tflops_per_device(self) -> float | None:
    """The model's own FLOPs, in 1e12 a second of the step that ran."""
    return self.measured and self.model_flops / self.measured / 1e12


class Refusal(NamedTuple):
  """A layout that cannot be: it divides no devices, or fits into none."""

  topology: str  # Its name.
  layout: str  # Its name.
  changes: dict[str, Any]  # As of `Plan`.
  reason: str  # A sentence.
  # Bytes of a device, at least, where that is the reason.
  needs: int | None = None
  has: int | None = None  # Bytes that there are.


Outcome = Plan | Refusal


def with_prefix(number: int) -> str:
  """Writes 1234567 as "1.23 M"; with a B behind, bytes."""
  scaled, prefixes = float(number), ["", "k", "M", "G", "T", "P"]
  while scaled >= 999.5 and len(prefixes) > 1:
    scaled /= 1000
    prefixes.pop(0)
  return f"{scaled:.3g} {prefixes[0]}"


class Program(NamedTuple):
  """A training step, compiled for devices that need not be there."""

  parts: session.Session  # What it is a step of.
  vocab_size: int  # The step's.
  topology: Topology  # Those devices.
  text: str  # Its instructions.
  memory: Memory  # Of one device.
  seconds: float  # How long compiling took here.
  measured: float | None  # As of `Plan`.


def make(
  experiment: config_lib.Experiment,
  vocab_size: int,
  topology: Topology,
  changes: dict[str, Any] | None = None,
  load: load_lib.Load | None = None,
) -> Outcome:
  """Compiles the training step of a config, and reads what it does.

  Arguments and errors are those of `program` and `read`.
  """
  made = program(experiment, vocab_size, topology)
  if isinstance(made, Refusal):
    return made._replace(changes=changes or {})
  return read(made, changes, load)


def program(
  experiment: config_lib.Experiment, vocab_size: int, topology: Topology
) -> Program | Refusal:
  """Compiles the training step of a config.

  On devices at hand the step also runs, a few times, if it fits. What no
  compiler could make fit is refused before one tries for minutes.
  ValueError where the layout does not divide the devices, or the config, or
  where the compiler cannot make a program of it.
  """
  parts = session.build(experiment, vocab_size, topology.devices)
  has = int(topology.chip.memory) if topology.chip else None
  if topology.is_here:
    has = state.device_memory(topology.devices[0])
  parameters, optimizer = map(state.bytes_per_device, parts.abstract_state[1:])
  least = state.bytes_per_device(parts.abstract_state)
  if has is not None and least > has:
    reason = (
      f"parameters and optimizer state alone need {with_prefix(least)}B of each"
      f" device, which has {with_prefix(has)}B; take more devices, or a layout"
      " that splits more."
    )
    return Refusal(topology.name, parts.layout.name, {}, reason, least, has)
  lowered = session.lower(parts)
  begin = time.monotonic()
  compiled, text, needs, limit = _compile(lowered, topology.options)
  took = time.monotonic() - begin
  if topology.is_here:
    needs += session.bytes_beside(parts)
  rest = needs - parameters - optimizer
  memory = Memory(parameters, optimizer, rest, limit or has)
  runs = topology.is_here and compiled is not None and memory.fits
  measured = _measure(compiled, parts) if runs else None
  return Program(parts, vocab_size, topology, text, memory, took, measured)


def read(
  made: Program,
  changes: dict[str, Any] | None = None,
  load: load_lib.Load | None = None,
) -> Plan:
  """Reads what a compiled step does.

  The changes go into the plan. The load of a run is taken in place of equally
  busy experts.
  """
  parts, topology, text = made.parts, made.topology, made.text
  experiment, vocab_size = parts.experiment, made.vocab_size
  chip = topology.chip
  busiest = 1.0
  if load is not None:
    with sharding.use(parts.layout, parts.mesh):
      busiest = load.busiest(sharding.num_devices("expert"))
  found = collectives.read(text, parts.mesh, topology.node, busiest)
  done = list(work.instructions(text, busiest))
  sorts = any(each.kind == "ragged-all-to-all" for each in found)
  count = cost.count(experiment, vocab_size)
  positions = {n: math.prod(a.shape) for n, a in parts.shapes.items()}
  target, source = cost.flops_per_word(experiment, vocab_size, count)
  flops = target * positions["mask"] + source * positions.get("source", 0)
  return Plan(
    topology=topology.name,
    layout=parts.layout.name,
    changes=changes or {},
    devices=len(topology.devices),
    inner=count.parameters,
    parameters=count.total,
    memory=made.memory,
    model_flops=flops / len(topology.devices),
    experts_share=cost.experts_share(experiment, vocab_size, count),
    ops_per_io=count.ops_per_io,
    flops=sum(each.flops for each in done),
    bytes=sum(each.bytes for each in done),
    launches=sum(e.launches for e in done) if chip and chip.gpu else None,
    is_bounded=all(each.is_bounded for each in done),
    collectives=found,
    estimate=chip and estimate(done, found, topology, parts.mesh),
    words=positions["mask"],
    compile_seconds=made.seconds,
    peak_flops=chip and chip.flops,
    measured=made.measured,
    busiest=busiest if sorts else 1.0,
    filled=work.filled(text, busiest) if sorts else None,
  )


def _compile(
  lowered: jax.stages.Lowered, options: Mapping[str, Any]
) -> tuple[jax.stages.Compiled | None, str, int, int | None]:
  """Compiles; returns the program, its text, and the bytes that it needs.

  The options are those of `Topology`. A TPU's compiler refuses a program that
  does not fit, but leaves its text: then there is no program, and the last
  number is how many bytes there are.
  """
  with tempfile.TemporaryDirectory() as folder:
    # A GPU's compiler would write a file for every kernel.
    if not options:
      options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    compiled = refused = None
    try:
      compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
      refused = session.out_of_memory(str(error))
      if refused is None:
        said = str(error).partition("\n")[0]
        raise ValueError(
          "the compiler makes no program of this step for these devices; take"
          " others, another layout, or a capacity in place of sorted rows. It"
          f" says: {said}"
        ) from error
    # What a v5p gives to its sparse cores cannot be asked for (jax 0.10).
    paths = list(pathlib.Path(folder).glob("*after_optimizations.txt"))
    if compiled is None or len(paths) == 1:
      text = paths[0].read_text(encoding="utf-8")
    else:
      text = compiled.as_text()
  if compiled is None:
    return None, text, *refused
  return compiled, text, session.bytes_needed(compiled), None


def _measure(compiled: jax.stages.Compiled, parts: session.Session) -> float:
  """Returns the median seconds of a step; the first is not counted."""
  current = state.create(
    parts.model,
    parts.tx,
    parts.shapes,
    parts.experiment.seed,
    parts.layout,
    parts.mesh,
  )
  ones = {n: np.ones(a.shape, a.dtype) for n, a in parts.shapes.items()}
  batch = step.place(ones, parts.batch_sharding)
  asked = processes.vote(False, parts.mesh)
  times = []
  for _ in range(REPEATS + 1):
    begin = time.perf_counter()
    current, _ = jax.block_until_ready(compiled(current, batch, asked))
    times.append(time.perf_counter() - begin)
  return statistics.median(times[1:])
