"""Plans as a table to read, a file to keep, and a figure to look at."""

import collections
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from moejax.planning.plan import (
  Estimate,
  Memory,
  Outcome,
  Plan,
  Refusal,
  with_prefix,
)

PLAN_FILE = "plan.json"
FIGURE_FILE = "plan.png"


def text(outcomes: Sequence[Outcome]) -> str:
  """Returns two tables: a column for each layout; collectives by axis.

  Below them it says why a layout cannot be, or what is not known of it.
  """
  columns = [_cells(each) for each in outcomes]
  names = list(dict.fromkeys(name for each in columns for name in each))
  lines = [[name, *(each.get(name, "-") for each in columns)] for name in names]
  sent = ["layout", "collective", "over", "a step", "each sends", "in all"]
  sent = [[*sent, "to other nodes"]]
  trouble = []
  for each in outcomes:
    where = f"{_name(each, [])} on {each.topology}"
    if isinstance(each, Refusal):
      trouble.append(f"{where}: {each.reason}")
      continue
    sent += [[each.layout, *row] for row in _collectives(each)]
    memory = each.memory
    if not memory.fits:
      trouble.append(
        f"{where}: needs {with_prefix(memory.needs)}B of each device, which has"
        f" {with_prefix(memory.has)}B; take more devices, a layout that splits"
        " more, or more config.train.microbatches (--suggest looks for them)."
      )
    elif not each.is_bounded:
      trouble.append(
        f"{where}: loops of unknown length, as over sorted rows, count once:"
        " FLOPs and time are more than the table says."
      )
  if not any(
    found.between_bytes
    for each in outcomes
    if isinstance(each, Plan)
    for found in each.collectives
  ):
    sent = [row[:-1] for row in sent]
  tables = [aligned(each) for each in (lines, sent) if len(each) > 1]
  return "\n\n".join([*tables, *trouble])


def tries(outcomes: Sequence[Outcome]) -> str:
  """Returns a line for each outcome of a search."""
  columns = ("needs", "fits", "ms a step, estimated", "bound by", "words/s")
  lines = [
    [_name(each, outcomes), *(_cells(each).get(name, "-") for name in columns)]
    for each in outcomes
  ]
  return aligned([["tried", *columns], *lines])


def write(
  outcomes: Sequence[Outcome], shown: Sequence[Outcome], folder: pathlib.Path
) -> None:
  """Writes all to `PLAN_FILE`, and draws what is shown in `FIGURE_FILE`.

  The figure has the memory of each plan against what there is and, where that
  is estimated, the time of a step against what was measured.
  """
  folder.mkdir(parents=True, exist_ok=True)
  everything = []
  for each in outcomes:
    values = each._asdict()
    if isinstance(each, Plan):
      memory, estimate = each.memory, each.estimate
      more = {"needs": memory.needs, "fits": memory.fits}
      values["memory"] = memory._asdict() | more
      values["tflops_per_device"] = each.tflops_per_device
      values["collectives"] = [found._asdict() for found in each.collectives]
      values["estimate"] = estimate and estimate._asdict() | {
        "seconds": estimate.seconds,
        "bound": estimate.bound,
        "words_per_second": each.words_per_second,
        "utilization": each.utilization,
      }
    everything.append(values)
  as_json = json.dumps(everything, indent=2)
  (folder / PLAN_FILE).write_text(as_json + "\n", encoding="utf-8")

  # Imported late: only figures need it. Not by pyplot: without its global state
  # a figure is always drawn by Agg.
  import matplotlib.figure

  plans = [each for each in shown if isinstance(each, Plan)]
  timed = [each for each in plans if each.estimate]
  panels = [("GB of each device", "memory", Memory._fields[:3], 1e-9, plans)]
  if timed:
    panels.append(
      ("ms a step, estimated", "estimate", Estimate._fields, 1e3, timed)
    )
  size = 10, 2 + 0.4 * len(shown)
  figure = matplotlib.figure.Figure(size, layout="constrained")
  all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
  for axes, (label, of, fields, scale, rows) in zip(
    all_axes, panels, strict=True
  ):
    left = np.zeros(len(rows))
    for field in fields:
      widths = [scale * getattr(getattr(row, of), field) for row in rows]
      axes.barh(range(len(rows)), widths, left=left, label=field)
      left += widths
    for i, row in enumerate(rows):
      if of == "memory" and row.memory.has is not None:
        axes.plot([scale * row.memory.has] * 2, [i - 0.45, i + 0.45], "k", lw=2)
      if of == "estimate" and row.measured:
        axes.plot([scale * row.measured], [i], "kD")
    # Beside the same plans the names stand already.
    is_named = of == "memory" or len(timed) < len(plans)
    names = [_name(row, plans) if is_named else "" for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.invert_yaxis()
    axes.legend(fontsize=7)
    axes.set_xlabel(label)
  figure.savefig(folder / FIGURE_FILE, dpi=120)


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
  """Returns a column of the table by the names of its lines."""
  cells = {"layout": outcome.layout, "topology": outcome.topology}
  for name, value in outcome.changes.items():
    cells[name.removeprefix("config.")] = str(value)
  if isinstance(outcome, Refusal):
    if outcome.needs:
      cells["needs"] = f"{with_prefix(outcome.needs)}B"
      cells["has"] = f"{with_prefix(outcome.has)}B"
    return cells | {"fits": "no"}
  memory, estimate = outcome.memory, outcome.estimate
  cells |= {
    "devices": str(outcome.devices),
    "all parameters": f"{outcome.parameters:,}",
    "but embedding, softmax": f"{outcome.inner:,}",
    "on a device: parameters": f"{with_prefix(memory.parameters)}B",
    "optimizer": f"{with_prefix(memory.optimizer)}B",
    "all else": f"{with_prefix(memory.rest)}B",
    "needs": f"{with_prefix(memory.needs)}B",
    "has": f"{with_prefix(memory.has)}B" if memory.has else "?",
    "fits": "yes" if memory.fits else "no",
    "FLOPs": with_prefix(outcome.flops),
    "over the model's": f"{outcome.flops / outcome.model_flops:.2f}",
    "bytes of memory moved": f"{with_prefix(outcome.bytes)}B",
    "experts, of the model's": f"{outcome.experts_share:.1%}",
  }
  if outcome.filled is not None:
    cells["busiest device, of the mean"] = f"{outcome.busiest:.2f}"
    cells["rows it fills, of those set aside"] = f"{outcome.filled:.1%}"
  if outcome.ops_per_io:
    cells["ops per number to or from experts"] = f"{outcome.ops_per_io:,.0f}"
  if estimate:
    fields = estimate._fields
    if outcome.launches is None:
      fields = fields[:-1]
    else:
      cells["kernels launched"] = f"{outcome.launches:,}"
    for name in fields:
      cells[f"ms {name}"] = f"{1e3 * getattr(estimate, name):,.1f}"
    cells |= {
      "ms a step, estimated": f"{1e3 * estimate.seconds:,.1f}",
      "bound by": estimate.bound,
      "words/s": f"{outcome.words_per_second:,.0f}",
      "utilization": f"{outcome.utilization:.1%}",
    }
  if outcome.measured:
    cells["ms a step, measured"] = f"{1e3 * outcome.measured:,.1f}"
    cells["TFLOPS a device, measured"] = f"{outcome.tflops_per_device:.3g}"
  return cells | {"s to compile": f"{outcome.compile_seconds:.0f}"}


def _collectives(plan: Plan) -> list[list[str]]:
  """Adds up the collectives of a kind and of axes, the largest first."""
  times, sent, between = (collections.Counter() for _ in range(3))
  for each in plan.collectives:
    axes = "groups of no axis" if each.axes is None else " ".join(each.axes)
    times[each.kind, axes] += each.times
    sent[each.kind, axes] += each.times * each.wire_bytes
    between[each.kind, axes] += each.times * each.between_bytes
  rows = []
  for key, total in sent.most_common():
    n = times[key]
    sizes = (total // n, total, between[key])
    rows.append([*key, f"{n:,}", *(f"{with_prefix(each)}B" for each in sizes)])
  return rows


def aligned(lines: Sequence[Sequence[str]]) -> str:
  """Returns a table of cells, the first column to the left, others right."""
  widths = [max(map(len, each)) for each in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
    for line in lines
  )
