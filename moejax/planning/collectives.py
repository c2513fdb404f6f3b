"""What a compiled program makes its devices say to each other."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from moejax.planning import hlo


class Collective(NamedTuple):
  """One exchange of a program, as one of its devices sees it.

  Attributes:
    kind: a key of `KINDS`.
    dtype: of what travels; that of the first array where there are several.
    bytes: of the result.
    wire_bytes: that one device sends each time, see `KINDS`.
    axes: the mesh axes it runs over; None where its groups of devices are not
      those of any axes.
    times: how often it runs.
    is_bounded: whether that is known; in a loop of unknown length it counts
      once a time round.
  """

  kind: str
  dtype: str
  bytes: int
  wire_bytes: int
  axes: tuple[str, ...] | None
  times: int
  is_bounded: bool


# What a device of a group of n sends for a result of b bytes, by the shortest
# way there is: rings for the first three.
KINDS = {
  "all-gather": lambda b, n: b * (n - 1) // n,
  "all-reduce": lambda b, n: 2 * b * (n - 1) // n,
  "reduce-scatter": lambda b, n: b * (n - 1),
  "all-to-all": lambda b, n: b * (n - 1) // n,
  # Of b bytes to be sent: where rows go is known to the running program alone,
  # and counted as if they went everywhere alike.
  "ragged-all-to-all": lambda b, n: b * (n - 1) // n,
  "collective-permute": lambda b, n: b,
}


def read(
  text: str, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
) -> list[Collective]:
  """Lists the collectives of a compiled program, in the order of its text.

  Reads what XLA prints for CPUs, GPUs and TPUs. An asynchronous one counts
  once, and so does one that a TPU spreads over several fusions; both branches
  of a condition count; one of each device with itself does not.

  Args:
    text: `jax.stages.Compiled.as_text()`.
    mesh: that the program was compiled for.

  Raises:
    ValueError: the program runs on another number of devices.
  """
  found, chains = [], set()
  for op, times, is_bounded, _ in hlo.walk(hlo.parse(text)):
    kind = op.opcode.removesuffix("-start")
    if kind not in KINDS:
      continue
    chain = re.search(r'chain_id="(\d+)"', op.rest)
    if chain and chain[1] in chains:
      continue
    if chain:
      chains.add(chain[1])
    groups, axes = _groups(op.rest, mesh)
    if groups == 1:
      continue
    of_result = hlo.size(hlo.result(op))
    if kind == "all-reduce" and op.within.name.startswith("all-reduce-scatter"):
      # A TPU's way to write it: every device keeps its part of the sums.
      kind, of_result = "reduce-scatter", of_result // groups
    sent = of_result
    if kind == "ragged-all-to-all":
      sent, _ = hlo.rows_and_room(op)
    dtype = hlo.arrays(op.shape)[0].dtype
    wire = KINDS[kind](sent, groups)
    found.append(
      Collective(kind, dtype, of_result, wire, axes, times, is_bounded)
    )
  return found


# -- groups of devices --------------------------------------------------------


def _groups(
  rest: str, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
) -> tuple[int, tuple[str, ...] | None]:
  """Returns the devices of a group, and the mesh axes along which they lie."""
  sizes = tuple(mesh.shape.values())
  pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", rest)
  ids = _lists(pairs[1]) if pairs else _replica_groups(rest, mesh.size)
  if ids.max() >= mesh.size or not (pairs or ids.size == mesh.size):
    raise ValueError(
      f"the program speaks of {ids.max() + 1} devices, but the mesh has"
      f" {mesh.size}; give the mesh it was compiled for."
    )
  places = np.stack(np.unravel_index(ids, sizes))
  differs = (places != places[:, :, :1]).any(axis=(1, 2))
  axes = np.array(tuple(mesh.shape))[differs].tolist()
  together = ids.shape[1]
  if not pairs and math.prod(mesh.shape[axis] for axis in axes) != together:
    return together, None
  return together, tuple(axes)


def _replica_groups(rest: str, num_devices: int) -> np.ndarray:
  """Reads {{0,1},{2,3}}, [2,2]<=[4], or mesh['a'=2,'b'=2] {'b'}."""
  if found := re.search(r"replica_groups=\{(\{.*?\})\}", rest):
    return _lists(found[1])
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
  axes = {n: int(size) for n, size in re.findall(r"'(\w+)'=(\d+)", named)}
  ids = _ids(order or f"[{num_devices}]")
  return _along(ids, axes, over)


def _along(ids: np.ndarray, axes: Mapping[str, int], over: str) -> np.ndarray:
  """Groups the devices of a mesh along 'axis', or 'axis':(before)size of it."""
  parts = {
    name: (int(before or 1), int(size or axes[name]))
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", over)
  }
  shape, along = [], []
  for name, size in axes.items():
    before, own = parts.get(name, (size, 1))
    along.append(len(shape) + 1)
    shape += [before, own, size // (before * own)]
  ids = np.moveaxis(ids.reshape(shape), along, range(-len(along), 0))
  return ids.reshape(-1, math.prod(own for _, own in parts.values()))


def _ids(text: str) -> np.ndarray:
  """Reads 0,2,1,3 or [2,2]T(1,0): numbers in a row, shaped, axes swapped."""
  if text[0] != "[":
    return np.array(_numbers(text))
  shape, _, order = text.partition("T")
  shape = _numbers(shape)
  ids = np.arange(math.prod(shape)).reshape(shape)
  return (ids.transpose(_numbers(order)) if order else ids).reshape(-1)


def _lists(text: str) -> np.ndarray:
  return np.array([_numbers(row) for row in re.findall(r"\{.*?\}", text)])


def _numbers(text: str) -> list[int]:
  return [int(number) for number in re.findall(r"\d+", text)]
