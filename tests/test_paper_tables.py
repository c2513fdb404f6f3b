"""The list of the paper's tables and figures: all of them, and made by what."""

import importlib
import pathlib
import re
import shlex

import pytest

from experiments import figures, harness, paper_tables

ITEMS = paper_tables.ITEMS


def test_none_of_the_paper_is_missing():
  names = {f"table_{n}" for n in range(1, 10)}
  assert set(ITEMS) == names | {f"figure_{n}" for n in range(1, 5)}


@pytest.mark.parametrize("name", ITEMS)
def test_what_makes_an_item_exists(name, capsys):
  item = ITEMS[name]
  if name != "figure_1":  # Which is a drawing.
    program, *flags = shlex.split(item.command)[2:]
    path = pathlib.Path(importlib.import_module(program).__file__)
    source = path.read_text(encoding="utf-8")
    assert all(re.match(r"--(\w+)=", flag)[1] in source for flag in flags)
  tables = [figures.read(figures.RESULTS / f"{n}.csv") for n in item.results]
  if item.ours:
    assert {*item.rows, *item.ours.values()} <= {*harness.columns(tables[0])}
  assert {len(x) for x in item.paper.values()} <= {len(item.columns)}
  paper_tables.main(["--list", name])
  said = capsys.readouterr().out
  assert name in said and item.command in said


def test_ours_stands_beside_the_papers(capsys):
  paper_tables.main(["table_2", "table_6", "table_7"])
  said = capsys.readouterr().out
  table = figures.read(figures.RESULTS / "capacity_curve_text_models.csv")
  (ours,) = (row["test"] for row in table if row["model"] == "moe_256")
  assert re.search(rf"\n +moe_256 +{ours} \(35\.7\)", said)
  assert re.search(r"0\.01 +0\.01 +94\.31 \(35\.7\) +0\.144 \(0\.48\)", said)
  # Of the paper alone, and of ours alone.
  assert re.search(r"gnmt +\(2\.79\) +\(39\.22\)", said)
  assert re.search(r"en-fr +moe_32 +9\.89 +27\.4", said)
  with pytest.raises(SystemExit):
    paper_tables.main(["table_10"])
  assert "table_10" in capsys.readouterr().err
