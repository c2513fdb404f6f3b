"""Notebooks are committed as their text twins leave them, pictures and all.

They run in the interpreter of the tests, whatever kernels are installed.
"""

import json
import re

import nbformat
import program
import pytest

from notebooks import execute


def text_of(cell):
  """What a cell prints, but for numbers, paths, and where objects lie."""
  texts = []
  for output in cell.outputs:
    assert output.output_type != "error"
    text = output.get("text") or output.get("data", {}).get("text/plain", "")
    text = re.sub(r"0x[\da-f]+", " ", text)
    texts.append(re.sub(r"\S*/\S*|[\W\d_]+", " ", text))
  return " ".join(" ".join(texts).split())


def pictures_of(cell):
  found = (output.get("data", {}).get("image/png") for output in cell.outputs)
  return [len(picture) * 3 / 4 for picture in found if picture]


@pytest.mark.parametrize("twin", execute.TWINS, ids=lambda twin: twin.stem)
def test_a_notebook_is_what_its_twin_does(twin):
  path = twin.with_suffix(".ipynb")
  assert path.stat().st_size < 300_000, "draw fewer, or smaller, pictures"
  committed = nbformat.read(path, as_version=4)
  nbformat.validate(committed)
  assert committed.metadata.kernelspec.name == "python3"
  again = f"run: python -m notebooks.execute {twin.stem}"
  got = execute.execute(
    twin,
    JAX_COMPILATION_CACHE_DIR=str(program.COMPILED),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.1",
  )
  assert len(committed.cells) == len(got.cells), again
  count = 0
  for old, new in zip(committed.cells, got.cells, strict=True):
    assert (old.cell_type, old.source) == (new.cell_type, new.source), again
    if old.cell_type != "code":
      continue
    count += 1
    assert old.execution_count == new.execution_count == count, again
    assert text_of(old) == text_of(new), again
    sizes = pictures_of(old)
    assert len(sizes) == len(pictures_of(new)) == ("plt.show" in new.source)
    assert max(sizes, default=0) < 40_000
    printed = json.dumps(new.outputs)
    assert "False" not in printed and "Warning" not in printed, new.source
  assert any("plt.show" in cell.source for cell in got.cells)
