"""Notebooks run from top to bottom, draw what they mean to, and are stripped.

They run in the interpreter of the tests, whatever kernels are installed.
"""

import os
import pathlib

import nbclient
import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))


def code_cells(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_draws_and_checks_what_it_means_to(path, tmp_path):
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  assert notebook.metadata.kernelspec.name == "python3"
  for cell in code_cells(notebook):
    assert cell.execution_count is None and not cell.outputs, cell.id
  # Without directories to search, the kernel is that of sys.executable.
  specs = KernelSpecManager(kernel_dirs=[])
  kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)
  client = nbclient.NotebookClient(
    notebook,
    km=kernel,
    timeout=300,
    resources={"metadata": {"path": str(path.parent)}},
  )
  # As a reader has it: one device, figures inline, no profile of one's own.
  env = os.environ | {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path)}
  for name in ("XLA_FLAGS", "MPLBACKEND"):
    env.pop(name, None)
  client.execute(env=env, cleanup_kc=True)
  figures = [cell for cell in code_cells(notebook) if "plt.show" in cell.source]
  assert figures
  for cell in figures:
    assert any("image/png" in o.get("data", {}) for o in cell.outputs), cell.id
  for cell in code_cells(notebook):
    streams = (o.text for o in cell.outputs if o.output_type == "stream")
    text = "".join(streams)
    assert "False" not in text and "Warning" not in text, (cell.id, text)
