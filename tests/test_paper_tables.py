"""The list of the paper's tables and figures: all of them, and made by what."""

import importlib
import pathlib
import re
import shlex

import pytest

from experiments import figures, harness, paper_tables

ITEMS = paper_tables.ITEMS


def test_none_of_the_paper_is_missing():
  assert set(ITEMS) == {
    *(f"table_{n}" for n in range(1, 10)),
    *(f"figure_{n}" for n in range(1, 5)),
  }


@pytest.mark.parametrize("name", ITEMS)
def test_what_makes_an_item_exists(name, capsys):
  item = ITEMS[name]
  if name != "figure_1":  # Which is a drawing.
    program, *flags = shlex.split(item.command)[2:]
    assert program.startswith("experiments.")
    path = pathlib.Path(importlib.import_module(program).__file__)
    source = path.read_text(encoding="utf-8")
    for flag in flags:
      assert re.match(r"--(\w+)=", flag)[1] in source
  for stem in item.results:
    table = figures.read(figures.RESULTS / f"{stem}.csv")
    if item.ours and stem == item.results[0]:
      assert {*item.rows, *item.ours.values()} <= {*harness.columns(table)}
  widths = {len(values) for values in item.paper.values()}
  assert widths <= {len(item.columns)}
  paper_tables.main(["--list", name])
  said = capsys.readouterr().out
  assert name in said and item.command in said


def test_ours_stands_beside_the_papers(capsys):
  paper_tables.main(["table_6", "table_7"])
  said = capsys.readouterr().out
  row = re.search(r"\n +moe_256 +(.*)", said)[1]
  ours = {
    row["model"]: row["test"]
    for row in figures.read(figures.RESULTS / "capacity_curve_text_models.csv")
  }
  assert row.startswith(f"{ours['moe_256']} (35.7)")
  assert re.search(r"0\.01 +0\.01 +94\.31 \(35\.7\) +0\.144 \(0\.48\)", said)


def test_an_unknown_item_is_refused(capsys):
  with pytest.raises(SystemExit):
    paper_tables.main(["table_10"])
  assert "table_10" in capsys.readouterr().err
