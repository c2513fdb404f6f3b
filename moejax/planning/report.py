"""Plans as a table to read, a file to keep, and a figure to look at."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib.figure

from moejax.planning import plan as plan_lib
from moejax.planning.plan import Estimate, Memory, Plan
from moejax.planning.search import Refusal

PLAN_FILE = "plan.json"
FIGURE_FILE = "plan.png"
Outcome = Plan | Refusal


def text(outcomes: Sequence[Outcome]) -> str:
  """Returns two tables: a column for each layout; collectives by axis."""
  columns = [_cells(each) for each in outcomes]
  names = list(dict.fromkeys(name for each in columns for name in each))
  lines = [[name, *(each.get(name, "-") for each in columns)] for name in names]
  talk = [
    [each.layout, *row]
    for each in outcomes
    if isinstance(each, Plan)
    for row in _exchanges(each)
  ]
  parts = [_aligned(lines)]
  if talk:
    head = ["layout", "collective", "over", "a step", "each sends", "in all"]
    parts.append(_aligned([head, *talk]))
  return "\n\n".join([*parts, *map(_trouble, filter(_trouble, outcomes))])


def tries(outcomes: Sequence[Outcome]) -> str:
  """Returns a line for each outcome: what a search has been through."""
  columns = ("needs", "fits", "ms a step, estimated", "bound by", "words/s")
  lines = [
    [_name(each, outcomes), *(_cells(each).get(name, "-") for name in columns)]
    for each in outcomes
  ]
  return _aligned([["tried", *columns], *lines])


def _trouble(outcome: Outcome) -> str:
  """Says why a layout cannot be, or what is not known of it; or nothing."""
  where = f"{_name(outcome, [])} on {outcome.topology}"
  if isinstance(outcome, Refusal):
    return f"{where}: {outcome.reason}"
  memory = outcome.memory
  if memory.fits:
    unknown = (
      f"{where}: some loops, as over sorted rows, go on until all is done, and"
      " count once here: FLOP and time are more than it says."
    )
    return "" if outcome.is_bounded else unknown
  needs, has = map(plan_lib.in_bytes, (memory.needs, memory.has))
  return (
    f"{where}: needs {needs} of each device, which has {has}; take more"
    " devices, a layout that splits more, or more config.train.microbatches"
    " (--suggest looks for them)."
  )


def write(
  outcomes: Sequence[Outcome], shown: Sequence[Outcome], folder: pathlib.Path
) -> None:
  """Writes all to `PLAN_FILE`, and draws what is shown in `FIGURE_FILE`."""
  folder.mkdir(parents=True, exist_ok=True)
  as_json = json.dumps([as_dict(each) for each in outcomes], indent=2)
  (folder / PLAN_FILE).write_text(as_json + "\n", encoding="utf-8")
  # Not by pyplot: without its global state a figure is always drawn by Agg.
  height = 2 + 0.4 * len(shown)
  figure = matplotlib.figure.Figure((10, height), layout="constrained")
  draw(figure, shown)
  figure.savefig(folder / FIGURE_FILE, dpi=120)


def as_dict(outcome: Outcome) -> dict[str, Any]:
  """Returns all that is known, in plain values."""
  if isinstance(outcome, Refusal):
    return outcome._asdict()
  values = outcome._asdict()
  values["memory"] = outcome.memory._asdict() | {
    "needs": outcome.memory.needs,
    "fits": outcome.memory.fits,
  }
  values["collectives"] = [each._asdict() for each in outcome.collectives]
  if outcome.estimate:
    values["estimate"] = outcome.estimate._asdict() | {
      "seconds": outcome.estimate.seconds,
      "bound": outcome.estimate.bound,
      "words_per_second": outcome.words_per_second,
      "utilisation": outcome.utilisation,
    }
  return values


def draw(figure: matplotlib.figure.Figure, outcomes: Sequence[Outcome]) -> None:
  """Draws memory against what there is and, where estimated, time."""
  plans = [each for each in outcomes if isinstance(each, Plan)]
  timed = [each for each in plans if each.estimate]
  names = [_name(each, plans) for each in plans]
  panels = figure.subplots(1, 2 if timed else 1, squeeze=False)[0]
  parts = {n: [getattr(p.memory, n) / 1e9 for p in plans] for n in _MEMORY}
  _stack(panels[0], names, parts)
  panels[0].set_xlabel("GB of each device")
  for row, each in enumerate(plans):
    if each.memory.has is not None:
      has = each.memory.has / 1e9
      panels[0].plot([has, has], [row - 0.45, row + 0.45], "k", lw=2)
  if timed:
    same = len(timed) == len(plans)
    names = [""] * len(timed) if same else [_name(e, plans) for e in timed]
    parts = {
      n: [1e3 * getattr(p.estimate, n) for p in timed] for n in Estimate._fields
    }
    _stack(panels[1], names, parts)
    panels[1].set_xlabel("ms a step, estimated")
    for row, each in enumerate(timed):
      if each.measured:
        panels[1].plot([1e3 * each.measured], [row], "kD")


_MEMORY = Memory._fields[:3]


def _stack(axes, names, parts):
  left = [0.0] * len(names)
  for label, values in parts.items():
    axes.barh(range(len(names)), values, left=left, label=label)
    left = [a + b for a, b in zip(left, values, strict=True)]
  axes.set_yticks(range(len(names)), names, fontsize=7)
  axes.invert_yaxis()
  axes.legend(fontsize=7)


def _name(outcome: Outcome, among: Sequence[Outcome]) -> str:
  parts = [outcome.layout]
  if len({each.topology for each in among}) > 1:
    parts.append(outcome.topology)
  parts += [
    f"{name.rpartition('.')[2]} {value}"
    for name, value in outcome.changes.items()
  ]
  return ", ".join(parts)


def _cells(outcome: Outcome) -> dict[str, str]:
  cells = {"layout": outcome.layout, "topology": outcome.topology}
  for name, value in outcome.changes.items():
    cells[name.removeprefix("config.")] = str(value)
  if isinstance(outcome, Refusal):
    if outcome.needs:
      cells["needs"] = plan_lib.in_bytes(outcome.needs)
      cells["has"] = plan_lib.in_bytes(outcome.has)
    return cells | {"fits": "no"}
  memory, estimate = outcome.memory, outcome.estimate
  cells |= {
    "devices": str(outcome.devices),
    "all parameters": f"{outcome.parameters:,}",
    "but embedding, softmax": f"{outcome.inner:,}",
    "on a device: parameters": plan_lib.in_bytes(memory.parameters),
    "optimiser": plan_lib.in_bytes(memory.optimizer),
    "all else": plan_lib.in_bytes(memory.rest),
    "needs": plan_lib.in_bytes(memory.needs),
    "has": plan_lib.in_bytes(memory.has) if memory.has else "?",
    "fits": "yes" if memory.fits else "no",
    "FLOP": plan_lib.with_prefix(outcome.flops),
    "over the model's": f"{outcome.flops / outcome.model_flops:.2f}",
  }
  if estimate:
    for name in estimate._fields:
      cells[f"ms {name}"] = f"{1e3 * getattr(estimate, name):,.1f}"
    cells |= {
      "ms a step, estimated": f"{1e3 * estimate.seconds:,.1f}",
      "bound by": estimate.bound,
      "words/s": f"{outcome.words_per_second:,.0f}",
      "utilisation": f"{outcome.utilisation:.1%}",
    }
  if outcome.measured:
    cells["ms a step, measured"] = f"{1e3 * outcome.measured:,.1f}"
  return cells | {"s to compile": f"{outcome.compile_seconds:.0f}"}


def _exchanges(plan: Plan) -> list[list[str]]:
  """Adds up the collectives of a kind and of axes, the largest first."""
  sums: dict[tuple[str, str], list[int]] = {}
  for each in plan.collectives:
    axes = "groups of no axis" if each.axes is None else " ".join(each.axes)
    total = sums.setdefault((each.kind, axes), [0, 0])
    total[0] += each.times
    total[1] += each.times * each.wire_bytes
  ordered = sorted(sums.items(), key=lambda item: -item[1][1])
  return [
    [
      kind,
      axes,
      f"{times:,}",
      plan_lib.in_bytes(sent // times),
      plan_lib.in_bytes(sent),
    ]
    for (kind, axes), (times, sent) in ordered
  ]


def _aligned(lines: Sequence[Sequence[str]]) -> str:
  widths = [max(map(len, each)) for each in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
    for line in lines
  )
