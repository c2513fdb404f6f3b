"""The program moejax, also as python -m moejax."""

import contextlib
import os
import pathlib
import sys

from moejax import signals, terminal

_HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def take_huge_pages() -> None:
  """Starts the program anew, with huge pages where Linux gives them if asked.

  On a CPU a step takes its arrays' memory from the kernel, and gives it back:
  by pages of 4 KB a fifth of a small model's step is the handing out. glibc
  asks for pages of 2 MB only if told to before the program starts. A setting of
  the user's own, as GLIBC_TUNABLES=glibc.malloc.hugetlb=0, stays.
  """
  given, ask = os.environ.get("GLIBC_TUNABLES", ""), "glibc.malloc.hugetlb"
  # Where there are no such pages, or no way to start anew, 4 KB will do.
  with contextlib.suppress(OSError):
    if ask not in given and "[madvise]" in _HUGE_PAGES.read_text():
      os.environ["GLIBC_TUNABLES"] = f"{given}:{ask}=1".lstrip(":")
      os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def run() -> None:
  """Runs the command line."""
  take_huge_pages()
  terminal.occupy()
  signals.guard()
  # Imported late: Ctrl-C may come before.
  from moejax import main

  main.console()


if __name__ == "__main__":
  run()
