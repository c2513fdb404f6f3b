"""What a compiled program makes its devices send to each other."""

import math
import re
from typing import NamedTuple

import jax
import numpy as np

from moejax.planning import hlo


class Collective(NamedTuple):
  """One exchange of a program, as one of its devices sees it."""

  kind: str  # A key of `KINDS`.
  # Of what is sent; that of the first array where there are several.
  dtype: str
  bytes: int  # Of the result.
  wire_bytes: int  # That one device sends each time, see `KINDS`.
  # The mesh axes it runs over; None where its groups of devices are not those
  # of any axes.
  axes: tuple[str, ...] | None
  times: int  # How often it runs.
  is_bounded: bool  # As of `hlo.Run`.
  between_bytes: int = 0  # Of `wire_bytes`, those that go to other nodes.


# What one of n devices sends at least for a result of b bytes; in rings for the
# first three.
KINDS = {
  "all-gather": lambda b, n: b * (n - 1) // n,
  "all-reduce": lambda b, n: 2 * b * (n - 1) // n,
  "reduce-scatter": lambda b, n: b * (n - 1),
  "all-to-all": lambda b, n: b * (n - 1) // n,
  # Of b bytes to be sent. Only the running program knows where rows go; they
  # count as if every device got as many, or what the busiest gets and returns.
  "ragged-all-to-all": lambda b, n: b * (n - 1) // n,
  "collective-permute": lambda b, n: b,
}


def read(
  text: str,
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
  node: int | None = None,
  busiest: float = 1.0,
) -> list[Collective]:
  """Lists the collectives of a program compiled for a mesh, as its text orders.

  A node is so many devices by their ids; without the number there is only one.
  An asynchronous one counts once, and so does one that a TPU spreads over
  several fusions; both branches of a condition count; one of each device with
  itself does not. The busiest device gets so many times the mean of the rows
  that are sent to experts.
  ValueError where the program runs on another number of devices.
  """
  found, chains = [], set()
  for op, times, is_bounded, _ in hlo.runs(text):
    kind, sent = op.kind, sum(each.bytes for each in op.results)
    if kind not in KINDS:
      continue
    if chain := re.search(r'chain_id="(\d+)"', op.rest):
      if chain[1] in chains:
        continue
      chains.add(chain[1])
    ids, axes = _groups(op.rest, mesh)
    size = ids.shape[1]
    if size == 1:
      continue
    if kind == "all-reduce" and op.within.name.startswith("all-reduce-scatter"):
      # So a TPU writes it: every device keeps its part of the sums.
      kind, sent = "reduce-scatter", sent // size
    result = sent
    if kind == "ragged-all-to-all":
      sent = round(busiest * hlo.rows_and_buffer(op)[0])
    wire = KINDS[kind](sent, size)
    between = wire * _share_between(kind, ids, mesh, node) if node else 0
    dtype = op.arrays[0].dtype
    found.append(
      Collective(
        kind, dtype, result, wire, axes, times, is_bounded, round(between)
      )
    )
  return found


def _share_between(
  kind: str, ids: np.ndarray, mesh: jax.sharding.Mesh, node: int
) -> float:
  """Returns which part of what a device sends goes to other nodes.

  With groups of n devices on m nodes. In rings every device first exchanges
  its n-th part with the same of the other nodes, m - 1 parts, and its node then
  completes what that brings: of the n - 1 parts in all. From everybody to
  everybody go n - n / m of n - 1 parts. Pairs go to other nodes if any does.
  """
  at = np.array([each.id // node for each in mesh.devices.flat])[ids]
  n, m = ids.shape[1], max(len(set(row)) for row in at.tolist())
  if kind == "collective-permute":
    return float(m > 1)
  if kind.endswith("all-to-all"):
    return (n - n / m) / (n - 1)
  return (m - 1) / (n - 1)


# -- groups of devices --------------------------------------------------------


def _groups(
  rest: str, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
) -> tuple[np.ndarray, tuple[str, ...] | None]:
  """Returns the devices of each group, and the mesh axes they lie along."""
  pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", rest)
  ids = _rows(pairs[1]) if pairs else _replica_groups(rest, mesh.size)
  if ids.max() >= mesh.size or not (pairs or ids.size == mesh.size):
    raise ValueError(
      f"the program is for {ids.max() + 1} devices, but the mesh has"
      f" {mesh.size}; give the mesh it was compiled for."
    )
  # [axes, groups, devices of a group]
  places = np.stack(np.unravel_index(ids, tuple(mesh.shape.values())))
  differs = (places != places[:, :, :1]).any(axis=(1, 2))
  axes = np.array(tuple(mesh.shape))[differs].tolist()
  size = math.prod(mesh.shape[axis] for axis in axes)
  return ids, tuple(axes) if pairs or size == ids.shape[1] else None


def _replica_groups(rest: str, num_devices: int) -> np.ndarray:
  """Reads {{0,1},{2,3}}, [2,2]<=[4], or mesh['a'=2,'b'=2] {'b'}."""
  if found := re.search(r"replica_groups=\{(\{.*?\})\}", rest):
    return _rows(found[1])
  if found := re.search(r"replica_groups=(\[[\d,]+\])<=(\[\S+)", rest):
    return _ids(found[2]).reshape(_numbers(found[1]))
  found = re.search(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(([^)]+(?:\([\d,]+\))?)\))? \{([^}]*)\}",
    rest,
  )
  if found is None:
    return np.arange(num_devices)[None]
  named, order, over = found.groups()
  # 'axis' is all of it; 'axis':(before)size a part that comes after so many.
  parts = {
    name: (int(before or 1), int(size) if size else None)
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", over)
  }
  shape, along = [], []
  for name, text in re.findall(r"'(\w+)'=(\d+)", named):
    size = int(text)
    before, own = parts.get(name, (size, 1))
    own = own or size
    along.append(len(shape) + 1)
    shape += [before, own, size // (before * own)]
  ids = _ids(order or f"[{num_devices}]").reshape(shape)
  own = math.prod(shape[axis] for axis in along)
  return np.moveaxis(ids, along, range(-len(along), 0)).reshape(-1, own)


def _ids(text: str) -> np.ndarray:
  """Reads 0,2,1,3 or [2,2]T(1,0): numbers in a row, shaped, axes swapped."""
  if text[0] != "[":
    return np.array(_numbers(text))
  shape, _, order = text.partition("T")
  ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
  return (ids.transpose(_numbers(order)) if order else ids).reshape(-1)


def _rows(text: str) -> np.ndarray:
  return np.array([_numbers(row) for row in re.findall(r"\{.*?\}", text)])


def _numbers(text: str) -> list[int]:
  return [int(number) for number in re.findall(r"\d+", text)]
