"""Runs the notebooks anew, with their pictures.

  python -m notebooks.execute [NAME ...]

A notebook NAME.ipynb is made of its text twin NAME.py, which is what to edit.
"""

import os
import pathlib
import sys
import tempfile

import jupytext
import nbclient
import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager

FOLDER = pathlib.Path(__file__).parent
TWINS = sorted(FOLDER.glob("[0-9]*.py"))


def read(twin: pathlib.Path) -> nbformat.NotebookNode:
  """Makes a notebook of its twin, without outputs."""
  notebook = jupytext.read(twin)
  for i, cell in enumerate(notebook.cells):
    cell.id = f"cell-{i}"  # Else a random one, in every run another.
  return notebook


def execute(twin: pathlib.Path, **variables: str) -> nbformat.NotebookNode:
  """Runs a notebook in this interpreter, with these environment variables."""
  notebook = read(twin)
  # Without directories to search, the kernel is that of sys.executable,
  # whatever kernels are installed.
  specs = KernelSpecManager(kernel_dirs=[])
  kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)
  with tempfile.TemporaryDirectory() as folder:
    client = nbclient.NotebookClient(
      notebook,
      km=kernel,
      timeout=600,
      record_timing=False,
      coalesce_streams=True,
      resources={"metadata": {"path": folder}},
    )
    # As a reader has it: one device, figures inline, no profile of one's own.
    paths = (str(FOLDER.parent), os.environ.get("PYTHONPATH"))
    env = {
      name: value
      for name, value in os.environ.items()
      if name not in ("XLA_FLAGS", "MPLBACKEND")
    } | {
      "IPYTHONDIR": folder,
      "PYTHONPATH": os.pathsep.join(filter(None, paths)),
      "JAX_PLATFORMS": "cpu",
      **variables,
    }
    client.execute(env=env, cleanup_kc=True)
  return notebook


if __name__ == "__main__":
  for name in sys.argv[1:] or [twin.stem for twin in TWINS]:
    twin = FOLDER / f"{name}.py"
    nbformat.write(execute(twin), twin.with_suffix(".ipynb"))
