"""Question: what does a layout of the mesh cost, and does it change a number?

Method: one layer, forward and backward with its balance losses, over 8 devices
in every layout and by every dispatch: 4096 tokens in 8 groups, D=256, 32 noisy
top-4 experts of F=512 ("two_level": 8 groups of 4, two of each), float32,
capacity factor 1.25 but for "dropless". "one device" is the same layer there.
Collectives are those of the compiled program: how many, and the megabytes that
one device sends by them (`planning.collectives.KINDS`). MB is what arguments,
results and temporaries take of one device. Differences to one device: of the
loss, relative; of the gradients, the largest entry over the largest entry of
its array. ms is the median of the repeats, all candidates in turn. Where there
are fewer than 8 accelerators the devices are threads of the CPU: then ms says
what the program's work costs, not what a network would add.

With --topology=v5e:4x4,... whole models take the layer's place: the training
step of the paper's MoE-256, MoE-4096-h (configs/lm1b) and MoE-131072-h
(configs/news), compiled for chips that need not be there (`moejax plan`), in
every layout and in the config's own; ms is then an estimate. A model whose
groups do not divide over the chips is left out.

Result: 8 threads of two cores of an Intel Xeon. No number changes: the loss by
at most 8e-8 of itself, a gradient by 1.3e-6 of its largest entry. By gather
"expert" sends 9.3 MB and holds 32, "replicated" 59 and 106. Sorted rows over
split experts send 15 MB by all-gathers and reduce-scatters here (a TPU sends
each row its own way), and dropless reserves buffers for the worst case.

Of whole models (results/sharding_layouts_topology.csv) those for the benchmark
fit 16 chips of a v5e (17.2 GB) in the configs' own layout alone, experts and
tables of words split: MoE-256 7.6 GB and 203 ms a step, MoE-4096-h 6.7 GB and
105 ms. MoE-131072-h on 128 chips of a v5p: experts over all chips 10.5 GB and
28 ms, two replicas of them over 64 each 17.2 and 220, the hidden layers of each
expert in halves 13.5 and 62.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
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


class Candidate(NamedTuple):
  """A layer compiled for one layout.

  Attributes:
    run: returns ((loss, metrics), gradients).
    found: its collectives.
    peak_bytes: on one device.
  """

  run: functools.partial
  found: list[collectives.Collective]
  peak_bytes: int


def rows(quick: bool, topology: str = "") -> Iterator[figures.Row]:
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
  T, D, F, E = (256, 8, 16, 32) if quick else (4096, 256, 512, 32)
  one = sharding.Layout("one device", (1, 1, 1), sharding.rules())
  layouts = [one, *sharding.LAYOUTS.values()]
  dispatches = list(CANDIDATES)
  if quick:
    layouts = [one, sharding.LAYOUTS["expert"]]
    dispatches = ["gather", "two_level"]
  x = jax.ShapeDtypeStruct((DEVICES, T // DEVICES, D), jnp.float32)
  candidates = {}
  with training.roughly_compiled(quick):
    for layout in layouts:
      own = devices[: 1 if layout is one else DEVICES]
      for name in dispatches:
        module = module_of(CANDIDATES[name], E, F, T // DEVICES)
        candidate = compiled(module, x, layout, own)
        candidates[layout.name, name] = candidate
  times = harness.interleaved(
    {key: each.run for key, each in candidates.items()}, 2 if quick else 5
  )
  found = [each for one in candidates.values() for each in one.found]
  kinds = [
    k for k in collectives.KINDS if any(each.kind == k for each in found)
  ]
  for (layout, name), candidate in candidates.items():
    alone = candidates[one.name, name]
    got, want = jax.device_get((candidate.run(), alone.run()))
    # By the largest entry of each array.
    off = jax.tree.map(lambda g, w: abs(g - w).max() / abs(w).max(), got, want)
    yield {
      "layout": layout,
      "dispatch": name,
      "ms": round(times[layout, name].median, 1),
      "MB": round(candidate.peak_bytes / 1e6, 3),
      **exchanged(candidate.found, kinds),
      "loss_difference": float(f"{off[0]:.1e}"),
      "gradient_difference": float(f"{max(jax.tree.leaves(off[1])):.1e}"),
    }


def module_of(
  options: dict[str, Any] | None, E: int, F: int, group_size: int
) -> nn.Module:
  """Returns the layer by a dispatch; where there are no options, two levels."""
  if options is None:
    inner = router.NoisyTopK(E // 8, 2), experts.FeedForward(E // 8, F)
    outer = router.NoisyTopK(8, 2)
    return moe.HierarchicalMoE(outer, moe.MoE(*inner), group_size=group_size)
  gate, own = router.NoisyTopK(E, 4), experts.FeedForward(E, F)
  return moe.MoE(gate, own, group_size=group_size, **options)


def compiled(
  module: nn.Module,
  x: jax.ShapeDtypeStruct,
  layout: sharding.Layout,
  devices: list[jax.Device],
) -> Candidate:
  """Compiles the layer's losses and gradients for a layout."""
  boxed = jax.eval_shape(module.init, jax.random.key(SEED), x)["params"]
  mesh = sharding.make_mesh(layout, devices)
  shardings = sharding.shardings(boxed, layout, mesh)
  batch = sharding.batch_sharding(layout, mesh, DEVICES)
  generator = np.random.default_rng(SEED)

  def normal(a, sharding, scale):
    values = generator.normal(0, scale, a.shape).astype(np.float32)
    return jax.device_put(values, sharding)

  # Not the modules' own: their router begins at zero.
  params = jax.tree.map(
    lambda w, sharding: normal(w, sharding, w.shape[-2] ** -0.5),
    nn.unbox(boxed),
    shardings,
  )
  x = normal(x, batch, 1)

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

  with sharding.use(layout, mesh):
    step = jax.jit(
      jax.value_and_grad(sharding.zero3(loss), (0, 1)),
      out_shardings=(None, (shardings, batch)),
    )
    program = step.lower(params, x).compile()
  return Candidate(
    functools.partial(program, params, x),
    collectives.read(program.as_text(), mesh),
    session_lib.bytes_needed(program),
  )


def planned(topologies: Sequence[str]) -> Iterator[figures.Row]:
  """Yields a row for each model, topology and layout."""
  for name in MODELS:
    config = training.load(name)
    experiment = config_lib.parse(config)
    vocab_size = config_lib.vocab_size(experiment)
    for topology in map(chips.find, topologies):
      groups = search.groups(experiment)
      if groups % len(topology.devices):
        terminal.say(
          f"{name}: {groups} groups of tokens do not divide over"
          f" {topology.name}; left out"
        )
        continue
      for choice in search.layouts(experiment).values():
        changes = {"config.layout": choice}
        outcome = search.attempt(experiment, vocab_size, topology, changes)
        row = {"model": name, "topology": topology.name}
        row |= {"layout": outcome.layout, "fits": False}
        if isinstance(outcome, plan.Refusal):
          needs = outcome.needs and round(outcome.needs / 1e9, 2)
          yield row | {"GB": needs, "refused": outcome.reason}
          continue
        estimate = outcome.estimate
        yield row | {
          "fits": outcome.memory.fits,
          "GB": round(outcome.memory.needs / 1e9, 2),
          "ms": estimate and round(1e3 * estimate.seconds, 1),
          "bound": estimate and estimate.bound,
          "flops_over_model": round(outcome.flops / outcome.model_flops, 3),
          **exchanged(outcome.collectives, list(collectives.KINDS)),
          "refused": None,
        }


def exchanged(
  found: list[collectives.Collective], kinds: list[str]
) -> figures.Row:
  """Counts collectives, and the megabytes that one device sends by them."""

  def sent(some):
    return round(sum(each.wire_bytes * each.times for each in some) / 1e6, 3)

  row = {"sent_MB": sent(found)}
  for kind in kinds:
    same = [each for each in found if each.kind == kind]
    row[kind] = sum(each.times for each in same)
    row[f"{kind}_MB"] = sent(same)
  return row


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  """Draws what is sent, what a device holds, and the time."""
  if "model" in table[0]:
    return draw_planned(figure, table)
  layouts, dispatches = (
    list(dict.fromkeys(row[column] for row in table))
    for column in ("layout", "dispatch")
  )
  meanings = {
    "sent_MB": "MB sent by one device",
    "MB": "MB held by one device",
    "ms": "ms, forward + backward",
  }
  for axes, column in figures.panels(figure, 3.6, meanings, sharey=True):
    values = np.array([row[column] for row in table], float)
    values = values.reshape(len(layouts), len(dispatches))
    axes.imshow(values, cmap="Blues", vmax=1.4 * values.max(), aspect="auto")
    for (y, x), value in np.ndenumerate(values):
      text = {"ha": "center", "va": "center", "fontsize": 8}
      axes.text(x, y, figures.number(value), **text)
    axes.set_xticks(range(len(dispatches)), dispatches, rotation=90)
    axes.set_yticks(range(len(layouts)), layouts)
    axes.grid(visible=False)
  worst = max(row["loss_difference"] for row in table)
  return (
    f"No layout changes the loss by more than {worst:.1g} of itself; by gather"
    " a device sends "
    + ", ".join(
      f"{row['sent_MB']:.0f} MB and holds {row['MB']:.0f} ({row['layout']})"
      for row in table
      if row["layout"] in ("expert", "replicated")
      and row["dispatch"] == "gather"
    )
  )


def draw_planned(figure: figures.Figure, table: list[figures.Row]) -> str:
  """Draws what whole models need, send and take, where they compile."""
  # A name for each line; below that of a model the layouts that it has.
  names, lines, best = [], {}, {}
  for row in table:
    if row["sent_MB"] is None:
      continue
    group = f"{figures.paper_name(row['model'])}, {row['topology']}"
    if group not in best:
      names.append(group)
    lines[len(names)] = row | {"GB sent": row["sent_MB"] / 1e3}
    names.append(row["layout"])
    if row["fits"] or group not in best:
      best[group] = min(row, best.get(group, row), key=lambda row: row["ms"])
  meanings = {
    "GB": "GB held by one chip",
    "GB sent": "GB sent by one chip a step",
    "ms": "ms a step, estimated",
  }
  height = 1.5 + 0.28 * len(names)
  for axes, column in figures.panels(figure, height, meanings, sharey=True):
    for y, row in lines.items():
      color = figures.SPARSE if row["fits"] else figures.GRAY
      axes.plot(row[column], y, "o", color=color)
      text = figures.number(row[column])
      figures.label(axes, text, (row[column], y), color, beside=True)
    axes.set_xscale("log")
    figures.plain(axes.xaxis, (1, 10, 100, 1000))
    axes.margins(x=0.3)
  first = figure.axes[0]
  first.set_ylim(len(names) - 0.5, -0.5)
  first.set_yticks(range(len(names)), names)
  for y, text in enumerate(first.get_yticklabels()):
    text.set_weight("normal" if y in lines else "bold")
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
