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

Result: no number changes, the loss by at most 8e-8 of itself, a gradient by
1.3e-6 of its largest entry. By gather "expert" sends 9.3 MB and holds 32,
"replicated" 59 and 106 (8 threads of two cores of an Intel Xeon). What whole
models need is in docs/planning.md (results/sharding_layouts*.csv).
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

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


def rows(quick: bool, topology: str = "") -> figures.Rows:
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
  T, D, F = (256, 8, 16) if quick else (4096, 256, 512)
  one = sharding.Layout("one device", (1, 1, 1), sharding.rules())
  layouts, dispatches = [one, *sharding.LAYOUTS.values()], list(CANDIDATES)
  if quick:
    layouts = [one, sharding.LAYOUTS["expert"]]
    dispatches = ["gather", "two_level"]
  x = jax.ShapeDtypeStruct((DEVICES, T // DEVICES, D), jnp.float32)
  runs, found, memory = {}, {}, {}
  with training.roughly_compiled(quick):
    for layout, name in itertools.product(layouts, dispatches):
      key = layout.name, name
      own = devices[: 1 if layout is one else DEVICES]
      module = module_of(CANDIDATES[name], F, T // DEVICES)
      runs[key], found[key], memory[key] = compiled(module, x, layout, own)
  times = harness.interleaved(runs, 2 if quick else 5)
  there = {each.kind for some in found.values() for each in some}
  kinds = [kind for kind in collectives.KINDS if kind in there]
  for layout, name in runs:
    got, want = (runs[key]() for key in ((layout, name), (one.name, name)))
    got, want = jax.device_get((got, want))
    # By the largest entry of each array.
    off = jax.tree.map(lambda g, w: abs(g - w).max() / abs(w).max(), got, want)
    yield {
      "layout": layout,
      "dispatch": name,
      "ms": round(times[layout, name].median, 1),
      "MB": round(memory[layout, name] / 1e6, 3),
      **exchanged(found[layout, name], kinds),
      "loss_difference": float(f"{off[0]:.1e}"),
      "gradient_difference": float(f"{max(jax.tree.leaves(off[1])):.1e}"),
    }


def module_of(
  options: dict[str, Any] | None, F: int, group_size: int
) -> nn.Module:
  """Returns the layer by a dispatch; where there are no options, two levels."""
  if options is None:
    inner = moe.MoE(router.NoisyTopK(4, 2), experts.FeedForward(4, F))
    outer = router.NoisyTopK(8, 2)
    return moe.HierarchicalMoE(outer, inner, group_size=group_size)
  own = router.NoisyTopK(32, 4), experts.FeedForward(32, F)
  return moe.MoE(*own, group_size=group_size, **options)


def compiled(
  module: nn.Module,
  x: jax.ShapeDtypeStruct,
  layout: sharding.Layout,
  devices: list[jax.Device],
) -> tuple[Callable[[], Any], list[collectives.Collective], int]:
  """Compiles the layer's losses and gradients for a layout.

  Returns:
    What runs it, its collectives, and its bytes on one device.
  """
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
    rngs = {"router": jax.random.key(2)}
    y, sown = module.apply(
      {"params": params}, x, train=True, rngs=rngs, mutable=[moe.ROUTING]
    )
    balance, _ = losses.auxiliary(losses.routings(sown), WEIGHTS)
    return jnp.square(y).mean() + balance

  with sharding.use(layout, mesh):
    step = jax.jit(
      jax.value_and_grad(sharding.zero3(loss), (0, 1)),
      out_shardings=(None, (shardings, batch)),
    )
    program = step.lower(params, x).compile()
  found = collectives.read(program.as_text(), mesh)
  needed = session_lib.bytes_needed(program)
  return functools.partial(program, params, x), found, needed


def planned(topologies: Sequence[str]) -> figures.Rows:
  """Yields a row for each model, topology and layout."""
  for name in MODELS:
    experiment = config_lib.parse(training.load(name))
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
  if "model" in table[0]:
    return draw_planned(figure, table)
  meanings = {
    "sent_MB": "MB sent by one device",
    "MB": "MB held by one device",
    "ms": "ms, forward + backward",
  }
  for axes, column in figures.panels(figure, 3.6, meanings, sharey=True):
    cells = {(r["layout"], r["dispatch"]): r[column] for r in table}
    most = 1.4 * max(cells.values())
    figures.grid(axes, cells, {key: x / most for key, x in cells.items()})
    axes.tick_params(axis="x", rotation=90)
  worst = max(row["loss_difference"] for row in table)
  sends = ", ".join(
    f"{row['sent_MB']:.0f} MB and holds {row['MB']:.0f} ({row['layout']})"
    for row in table
    if row["layout"] in ("expert", "replicated") and row["dispatch"] == "gather"
  )
  return (
    f"No layout changes the loss by more than {worst:.1g} of itself; by gather"
    f" a device sends {sends}"
  )


def draw_planned(figure: figures.Figure, table: list[figures.Row]) -> str:
  """Draws what whole models need, send and take; darker where they fit."""
  compiled = {
    (r["layout"], f"{figures.paper_name(r['model'])}\n{r['topology']}"): r
    for r in table
    if r["sent_MB"] is not None
  }
  meanings = {
    "GB": "GB held by one chip",
    "sent_MB": "GB sent by one chip a step",
    "ms": "ms a step, estimated",
  }
  shades = {key: 0.4 if r["fits"] else 0.05 for key, r in compiled.items()}
  for axes, column in figures.panels(figure, 3.6, meanings, sharey=True):
    unit = 1e3 if column == "sent_MB" else 1
    cells = {key: r[column] / unit for key, r in compiled.items()}
    figures.grid(axes, cells, shades)
    axes.tick_params(axis="x", labelsize=6.5)
  fastest = {}
  for (layout, model), row in compiled.items():
    if row["fits"]:
      found = (row["ms"], layout)
      fastest[model] = min(found, fastest.get(model, found))
  return "Fastest layouts that fit (darker): " + ", ".join(
    f"{layout} {figures.number(ms)} ms ({model.replace(chr(10), ', ')})"
    for model, (ms, layout) in fastest.items()
  )


if __name__ == "__main__":
  topology = "devices that need not be there, such as v5e:4x4,v5p:4x4x8"
  harness.main("sharding_layouts", rows, draw, SEED, topology=topology)
