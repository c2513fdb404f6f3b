"""How the program starts: with huge pages, where Linux gives them if asked."""

import os
import subprocess
import sys

import pytest

CODE = """
import os, pathlib, sys
from moejax import __main__
__main__._HUGE_PAGES = pathlib.Path(sys.argv[1])
print(os.getpid(), flush=True)
__main__.take_huge_pages()
print(os.environ.get("GLIBC_TUNABLES"))
"""
ASKED = "glibc.malloc.hugetlb=1"


@pytest.mark.parametrize(
  "enabled, given, starts, want",
  [
    ("always [madvise] never", None, 2, ASKED),
    ("always [madvise] never", "glibc.a.b=3", 2, f"glibc.a.b=3:{ASKED}"),
    ("always [madvise] never", "glibc.malloc.hugetlb=0", 1, None),
    ("[always] madvise never", None, 1, None),
    ("always madvise [never]", None, 1, None),
    (None, None, 1, None),
  ],
)
def test_the_program_asks_for_huge_pages_once(
  enabled, given, starts, want, tmp_path
):
  setting = tmp_path / "enabled"
  if enabled:
    setting.write_text(enabled)
  environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
  if given:
    environment["GLIBC_TUNABLES"] = given
  command = [sys.executable, "-c", CODE, str(setting)]
  said = subprocess.check_output(command, env=environment, text=True).split()
  *pids, tunables = said
  # It starts anew as the same process.
  assert len(pids) == starts and len(set(pids)) == 1
  assert tunables == (want or str(given))
