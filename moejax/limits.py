"""Limits of the system (ulimit) under which C++ libraries hang or abort."""

import os
import resource

# Open files that training takes at the least, and that are plenty.
_FEW_FILES, _MANY_FILES = 128, 4096
_GIB = 2**30


def check() -> None:
  """Refuses limits that are too low; raises that of open files where it may.

  OSError names the limit, what is needed and the command that gives it.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if 0 <= soft < _MANY_FILES:
    soft = _MANY_FILES if hard < 0 else min(hard, _MANY_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft < _FEW_FILES:
      raise OSError(
        f"only {soft} files may be open at once; allow {_FEW_FILES} or more, by"
        f" ulimit -n {_MANY_FILES}."
      )
  cores = os.cpu_count() or 1
  # Stacks and heaps of threads are reserved, far more than is ever used.
  needed = 4 * _GIB + cores * _GIB // 2
  for option, limit in (("v", resource.RLIMIT_AS), ("d", resource.RLIMIT_DATA)):
    soft, _ = resource.getrlimit(limit)
    if 0 <= soft < needed:
      raise OSError(
        f"only {soft:,} bytes of memory may be reserved, though not all of it"
        f" is used; allow {needed:,} or more, by ulimit -{option} unlimited."
      )
