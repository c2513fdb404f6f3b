"""Question: what does a layout of the mesh cost, and does it change a number?

Method: one layer, forward and backward with its balance losses, over 8 devices
in every layout and by every dispatch: 4096 tokens in 8 groups, D=256, 32 noisy
top-4 experts of F=512 ("two_level": 8 groups of 4, two of each), float32,
capacity factor 1.25 but for "dropless". "one device" is the same layer there.
Collectives are those of the compiled program: how many, and the megabytes that
one device sends by them (`planning.collectives.KINDS`). MB is what arguments,
results and temporaries take of one device. Differences to one device: of the
loss, relative; of the gradients, the largest entry over the largest entry of
its array. ms is the median of the repeats, all candidates in turn.

With --topology=v5e:4x4,... whole models take the layer's place: the training
step of the paper's MoE-256, MoE-4096-h (configs/lm1b) and MoE-131072-h
(configs/news), compiled for chips that need not be there (`moejax plan`), in
every layout and in the config's own; ms is then an estimate. Groups of tokens
that are together at the second level are those of one data replica. A model
whose groups do not divide over the chips is left out.

Where there are fewer than 8 accelerators the devices are 8 threads of the CPU:
then a collective is a copy in memory, and ms says what the program's work
costs, not what a network would add. Multiply the megabytes by yours for that.

Result: 8 threads of two cores of an Intel Xeon, jax 0.10.2. No number changes:
the loss by at most 8e-8 of itself, a gradient by 1.3e-6 of its largest entry.
By gather "expert" sends 9.3 MB and holds 32, "replicated" 59 and 106; "fsdp"
sends twice that and saves less than one would think, as a layer alone is all at
work: its gain is the other layers' weights and optimiser state. Sorted rows
over split experts send 15 MB by all-gathers and reduce-scatters here (a TPU
sends each row its own way), and dropless sets room aside for the worst case,
which the CPU works through: 3.9 times gather's time. Time is least where least
is copied.

Of whole models (results/sharding_layouts_topology.csv) those for the benchmark
fit 16 chips of a v5e (17.2 GB) in the configs' own layout alone, experts and
tables of words split: MoE-256 7.6 GB and 203 ms a step, MoE-4096-h 6.7 GB and
105 ms; all others need 18 to 61 GB, and 2.2 to 31 times as long: gradients of
whole tables, 25 GB of float32, are summed over the chips in every microbatch.
MoE-131072-h on 128 chips of a v5p: experts over all chips 10.5 GB and 28 ms,
two replicas of them over 64 each 17.2 and 220, the hidden layers of each expert
in halves 13.5 and 62; whole layers gathered (fsdp) need 631 GB. Collectives
are in the table; compiled in 19 minutes on one core of an EPYC, nothing ran.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np

from experiments import figures, harness, training
from moejax import config as config_lib
from moejax import experts, losses, moe, router, sharding, terminal
from moejax.planning import chips, collectives, plan, search
from moejax.training import session as session_lib

SEED = 0
DEVICES = 8
WEIGHTS = {"importance": 0.1, "load": 0.1}
CANDIDATES = {
  "einsum": {"dispatch": "einsum"},
  "gather": {"dispatch": "gather"},
  "ragged": {"dispatch": "ragged"},
  "dropless": {"dispatch": "ragged", "capacity_factor": None},
  "two_level": None,
}


# Of configs/; planned whole where there is a --topology.
MODELS = ("lm1b/moe_256", "lm1b/moe_4096_h", "news/moe_131072_h")


class Sizes(NamedTuple):
  """Of the layer and its batch."""

  tokens: int = 4096
  width: int = 256
  hidden: int = 512
  num_experts: int = 32


class Candidate(NamedTuple):
  """A layer compiled for one layout, and its arguments there.

  Attributes:
    run: (params, x, buffers of the turn before) -> ((loss, metrics), gradients)
    args: params and x.
    found: its collectives.
    peak_bytes: on one device.
  """

  run: jax.stages.Compiled
  args: tuple[Any, jax.Array]
  found: list[collectives.Collective]
  peak_bytes: int


def rows(quick: bool, topology: str = "") -> Iterator[harness.Row]:
  """Yields a row for each layout and dispatch, or of whole models' plans."""
  if topology:
    yield from planned(topology.split(","))
    return
  # Says nothing to accelerators. Refused where the CPU is in use already.
  with contextlib.suppress(RuntimeError):
    jax.config.update("jax_num_cpu_devices", DEVICES)
  devices = jax.devices()
  if len(devices) < DEVICES:
    devices = jax.devices("cpu")
  sizes = Sizes(256, 8, 16) if quick else Sizes()
  one = sharding.Layout("one device", (1, 1, 1), sharding.rules())
  layouts = {one: devices[:1]}
  names = ("expert", "fsdp") if quick else sharding.LAYOUTS
  layouts |= {sharding.LAYOUTS[name]: devices[:DEVICES] for name in names}
  with training.in_haste() if quick else contextlib.nullcontext():
    candidates = {
      (layout.name, name): compiled(module, sizes, layout, devices)
      for layout, devices in layouts.items()
      for name, module in modules(sizes).items()
    }
  times = harness.interleaved(
    {key: functools.partial(run, each) for key, each in candidates.items()},
    2 if quick else 5,
  )
  found = [each for one in candidates.values() for each in one.found]
  kinds = [
    k for k in collectives.KINDS if any(each.kind == k for each in found)
  ]
  for (layout, name), candidate in candidates.items():
    yield {
      "layout": layout,
      "dispatch": name,
      "ms": round(times[layout, name].median, 1),
      "MB": round(candidate.peak_bytes / 1e6, 3),
      **exchanged(candidate.found, kinds),
      **differences(candidate, candidates[one.name, name]),
    }


def planned(topologies: Sequence[str]) -> Iterator[harness.Row]:
  """Yields a row for each model, topology and layout."""
  for name in MODELS:
    config = training.load(name)
    vocab_size = config_lib.vocab_size(config)
    for topology in map(chips.find, topologies):
      groups = search.groups(config)
      if groups % len(topology.devices):
        terminal.say(
          f"{name}: {groups} groups of tokens do not divide over"
          f" {topology.name}; left out"
        )
        continue
      for choice in search.layouts(config).values():
        changes = {"config.layout": choice}
        yield {
          "model": name,
          "topology": topology.name,
          **planned_row(search.attempt(config, vocab_size, topology, changes)),
        }


def planned_row(outcome: plan.Outcome) -> harness.Row:
  """Returns what is known of a plan."""
  row = {"layout": outcome.layout, "fits": False}
  if isinstance(outcome, plan.Refusal):
    needs = outcome.needs and round(outcome.needs / 1e9, 2)
    return row | {"GB": needs, "refused": outcome.reason}
  estimate = outcome.estimate
  return row | {
    "fits": outcome.memory.fits,
    "GB": round(outcome.memory.needs / 1e9, 2),
    "ms": estimate and round(1e3 * estimate.seconds, 1),
    "bound": estimate and estimate.bound,
    "flops_over_model": round(outcome.flops / outcome.model_flops, 3),
    **exchanged(outcome.collectives, list(collectives.KINDS)),
    "refused": None,
  }


def modules(sizes: Sizes) -> dict[str, nn.Module]:
  """Returns the layer by every dispatch."""
  E, F = sizes.num_experts, sizes.hidden
  group = {"group_size": sizes.tokens // DEVICES}

  def layer(options):
    if options is None:
      within = moe.MoE(
        router.NoisyTopK(E // 8, 2), experts.FeedForward(E // 8, F)
      )
      return moe.HierarchicalMoE(router.NoisyTopK(8, 2), within, **group)
    gate, own = router.NoisyTopK(E, 4), experts.FeedForward(E, F)
    return moe.MoE(gate, own, **group, **options)

  return {name: layer(options) for name, options in CANDIDATES.items()}


def compiled(
  module: nn.Module,
  sizes: Sizes,
  layout: sharding.Layout,
  devices: list[jax.Device],
) -> Candidate:
  """Compiles the layer's losses and gradients for a layout."""
  shape = (DEVICES, sizes.tokens // DEVICES, sizes.width)
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  boxed = jax.eval_shape(module.init, jax.random.key(SEED), x)["params"]
  mesh = sharding.make_mesh(layout, devices)
  places = sharding.shardings(boxed, layout, mesh)
  batch = sharding.batch_sharding(layout, mesh, DEVICES)
  generator = np.random.default_rng(SEED)

  def draw(w, where, scale):
    values = generator.normal(0, scale, w.shape).astype(np.float32)
    return jax.device_put(values, where)

  # Not the modules' own: their router begins at zero.
  params = jax.tree.map(
    lambda w, where: draw(w, where, w.shape[-2] ** -0.5),
    nn.unbox(boxed),
    places,
  )
  x = draw(x, batch, 1)
  with sharding.use(layout, mesh):
    step = jax.jit(
      functools.partial(losses_and_gradients, module),
      out_shardings=(None, (places, batch)),
    )
    program = step.lower(params, x).compile()
  found = collectives.read(program.as_text(), mesh)
  return Candidate(
    program, (params, x), found, session_lib.bytes_needed(program)
  )


def losses_and_gradients(module: nn.Module, params: Any, x: jax.Array) -> Any:
  """Returns the loss of task and balance, and its gradient by params and x."""

  def loss(params, x):
    y, sown = module.apply(
      {"params": params},
      x,
      train=True,
      rngs={"router": jax.random.key(2)},
      mutable=[moe.ROUTING],
    )
    balance, _ = losses.auxiliary(losses.routings(sown), WEIGHTS)
    return jnp.square(y).mean() + balance

  return jax.value_and_grad(sharding.gathered(loss), (0, 1))(params, x)


def run(candidate: Candidate) -> Any:
  return candidate.run(*candidate.args)


def exchanged(
  found: list[collectives.Collective], kinds: list[str]
) -> harness.Row:
  """Counts collectives, and the megabytes that one device sends by them."""

  def sent(some):
    return round(sum(each.wire_bytes * each.times for each in some) / 1e6, 3)

  row = {"sent_MB": sent(found)}
  for kind in kinds:
    same = [each for each in found if each.kind == kind]
    row[kind] = sum(each.times for each in same)
    row[f"{kind}_MB"] = sent(same)
  return row


def differences(candidate: Candidate, one: Candidate) -> harness.Row:
  """Compares loss and gradients with those of one device."""
  got, want = jax.device_get((run(candidate), run(one)))

  def off(got, want):
    return float(np.abs(got - want).max() / np.abs(want).max())

  slopes = jax.tree.leaves(jax.tree.map(off, got[1], want[1]))
  return {
    "loss_difference": float(f"{off(got[0], want[0]):.1e}"),
    "gradient_difference": float(f"{max(slopes):.1e}"),
  }


def draw(figure: matplotlib.figure.Figure, table: list[harness.Row]) -> str:
  """Draws what is sent, what a device holds, and the time."""
  if "model" in table[0]:
    return draw_planned(figure, table)
  figure.set_size_inches(8, 3.6)
  layouts, dispatches = (
    list(dict.fromkeys(row[column] for row in table))
    for column in ("layout", "dispatch")
  )
  panels = {
    "sent_MB": "MB sent by one device",
    "MB": "MB held by one device",
    "ms": "ms, forward + backward",
  }
  for axes, (column, meaning) in zip(
    figure.subplots(1, 3, sharey=True), panels.items(), strict=True
  ):
    values = np.array([row[column] for row in table], float)
    values = values.reshape(len(layouts), len(dispatches))
    axes.imshow(values, cmap="Blues", vmax=1.4 * values.max(), aspect="auto")
    for (y, x), value in np.ndenumerate(values):
      text = {"ha": "center", "va": "center", "fontsize": 8}
      axes.text(x, y, figures.number(value), **text)
    axes.set_xticks(range(len(dispatches)), dispatches, rotation=90)
    axes.set_yticks(range(len(layouts)), layouts)
    axes.grid(visible=False)
    axes.set_title(meaning)
  own = {r["layout"]: r for r in table if r["dispatch"] == "gather"}
  worst = max(row["loss_difference"] for row in table)
  return (
    f"No layout changes the loss by more than {worst:.1g} of itself; by gather"
    " a device sends "
    + ", ".join(
      f"{row['sent_MB']:.0f} MB and holds {row['MB']:.0f} ({name})"
      for name, row in own.items()
      if name in ("expert", "replicated")
    )
  )


def draw_planned(
  figure: matplotlib.figure.Figure, table: list[harness.Row]
) -> str:
  """Draws what whole models need, send and take, where they compile."""
  table = [row for row in table if row.get("sent_MB") is not None]
  figure.set_size_inches(8, 1.5 + 0.28 * len(table))
  rows, best = [], {}
  for row in table:
    group = f"{figures.paper_name(row['model'])}, {row['topology']}"
    if group not in best:
      rows.append((group, None))
      best[group] = row
    rows.append((row["layout"], row))
    if row["fits"] and row["ms"] <= best[group]["ms"]:
      best[group] = row
  panels = {
    "GB": ("GB held by one chip", 1),
    "sent_MB": ("GB sent by one chip a step", 1e3),
    "ms": ("ms a step, estimated", 1),
  }
  for axes, (column, (meaning, unit)) in zip(
    figure.subplots(1, 3, sharey=True), panels.items(), strict=True
  ):
    for y, (_, row) in enumerate(rows):
      if row and row[column] is not None:
        at = (row[column] / unit, y)
        color = figures.SPARSE if row["fits"] else figures.GRAY
        axes.plot(*at, "o", color=color)
        figures.label(axes, figures.number(at[0]), at, color, beside=True)
    axes.set_xscale("log")
    figures.plain(axes.xaxis, (1, 10, 100, 1000))
    axes.margins(x=0.3)
    axes.set_title(meaning)
  first = figure.axes[0]
  first.set_ylim(len(rows) - 0.5, -0.5)
  first.set_yticks(range(len(rows)), [name for name, _ in rows])
  for text, (_, row) in zip(first.get_yticklabels(), rows, strict=True):
    text.set_weight("normal" if row else "bold")
  return "Fastest layouts that fit: " + ", ".join(
    f"{row['layout']} {figures.number(row['ms'])} ms ({group})"
    for group, row in best.items()
  )


if __name__ == "__main__":
  harness.main(
    "sharding_layouts",
    rows,
    draw,
    SEED,
    topology="devices that need not be there, such as v5e:4x4,v5p:4x4x8",
  )
