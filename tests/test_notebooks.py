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


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
  return request.param


@pytest.fixture(scope="module")
def executed(path, tmp_path_factory):
  notebook = nbformat.read(path, as_version=4)
  # Without directories to search, the kernel is that of sys.executable.
  kernel = AsyncKernelManager(
    kernel_name="python3",
    kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),
  )
  client = nbclient.NotebookClient(
    notebook,
    km=kernel,
    timeout=300,
    resources={"metadata": {"path": str(path.parent)}},
  )
  # As a reader has it: one device, figures inline, no profile of one's own.
  env = os.environ | {
    "PYTHONPATH": str(ROOT),
    "IPYTHONDIR": str(tmp_path_factory.mktemp("ipython")),
  }
  for name in ("XLA_FLAGS", "MPLBACKEND"):
    env.pop(name, None)
  client.execute(env=env, cleanup_kc=True)
  return notebook


def test_there_are_notebooks():
  assert NOTEBOOKS


def test_outputs_are_stripped(path):
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  assert notebook.metadata.kernelspec.name == "python3"
  for cell in code_cells(notebook):
    assert cell.execution_count is None, cell.id
    assert not cell.outputs, cell.id


def test_figures_are_drawn(executed):
  figures = [cell for cell in code_cells(executed) if "plt.show" in cell.source]
  assert figures
  for cell in figures:
    images = [o for o in cell.outputs if "image/png" in o.get("data", {})]
    assert images, cell.id


def test_checks_hold_without_warnings(executed):
  for cell in code_cells(executed):
    text = "".join(
      output.text for output in cell.outputs if output.output_type == "stream"
    )
    assert "False" not in text, (cell.id, text)
    assert "Warning" not in text, (cell.id, text)
