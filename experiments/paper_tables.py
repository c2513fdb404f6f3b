"""Every table and figure of the paper: its command, its result, its values.

  python -m experiments.paper_tables [--list] [ITEM ...]

prints our values beside the paper's, for all or for some: table_7 figure_2.
With --list it prints what makes each: the command, the committed result, the
paper's values. Ours are models of an eighth or a quarter of the paper's widths
on some hundredth of its text, or less; they show directions, not its numbers.

Models are named as the files of configs/: lm1b for Table 7, news for Table 8.
"""

import argparse
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from experiments import figures, harness
from moejax import terminal


def _table(text: str) -> dict[str, tuple[str, ...]]:
  rows = (line.split() for line in text.strip().splitlines())
  return {name: tuple(x.strip("-") for x in row) for name, *row in rows}


# Perplexity after 10 epochs and in the end, ops/timestep and parameters without
# embedding and softmax in millions, all parameters in billions, dropout, TFLOPS
# per GPU; as printed. Those marked * in the paper are Jozefowicz et al.'s.
TABLE_7 = _table("""
  kneser_ney_5        -     67.6  0.00001  -       1.8  -     -
  lstm_512_512        -     54.1  2.4      2.4     0.8  0.1   -
  lstm_1024_512       -     48.2  4.7      4.7     0.8  0.1   -
  lstm_2048_512       44.7  -     9.4      9.4     0.8  0.1   1.21
  four_lstm_512       46.0  -     8.4      8.4     0.8  0.1   1.07
  moe_1_wide          46.1  -     8.4      8.4     0.8  0.1   1.29
  moe_1_deep          45.7  -     8.4      8.4     0.8  0.1   1.29
  moe_4               45.0  -     8.4      8.4     0.8  0.1   0.52
  moe_32              39.7  -     8.4      37.8    0.9  0.1   0.87
  moe_256             35.7  -     8.6      272.9   1.1  0.1   0.81
  moe_256_h           36.0  -     8.4      272.9   1.1  0.1   0.89
  moe_1024_h          34.6  -     8.5      1079.0  1.9  0.2   0.90
  moe_4096_h          34.1  -     8.9      4303.4  5.1  0.2   0.74
  two_lstm_8192_1024  34.7  30.6  151.0    151.0   1.8  0.25  1.09
  moe_34m             31.3  -     33.8     4313.9  6.0  0.3   1.22
  moe_143m            28.0  -     142.7    4371.1  6.0  0.4   1.56
""")
# The four of Table 7 that Table 1 compares: hours and K40s of ten epochs.
TABLE_1 = {
  "two_lstm_8192_1024": ("59", "32"),
  "moe_4096_h": ("15", "16"),
  "moe_34m": ("17", "32"),
  "moe_143m": ("47", "32"),
}
# Perplexity after a tenth of the 100 billion words and after all, then as in
# Table 7, without dropout.
TABLE_8 = _table("""
  kneser_ney_5   67.1  45.3  0.00001  -         76.0   -
  four_lstm_512  54.5  47.0  8.4      8.4       0.1    1.23
  moe_32         48.5  40.4  8.4      37.8      0.1    0.83
  moe_256_h      42.8  35.3  8.4      272.9     0.4    1.11
  moe_1024_h     40.3  32.7  8.5      1079.0    1.2    1.14
  moe_4096_h     38.9  30.9  8.6      4303.4    4.4    1.07
  moe_16384_h    38.2  29.7  8.8      17201.0   17.3   0.96
  moe_65536_h    38.2  28.9  9.2      68791.0   68.9   0.72
  moe_131072_h   39.8  29.2  9.7      137577.6  137.7  0.30
""")
# Test perplexity, BLEU, ops/timestep in millions, parameters.
TABLE_2 = {
  "moe_2048_h": ("2.69", "40.35", "85", "8.7B"),
  "moe_2048_h, twice the time": ("2.63", "40.56", "85", "8.7B"),
  "gnmt": ("2.79", "39.22", "214", "278M"),
  "gnmt, with RL": ("2.96", "39.92", "214", "278M"),
  "PBMT": ("", "37.0", "", ""),
  "LSTM (6-layer)": ("", "31.5", "", ""),
  "LSTM (6-layer+PosUnk)": ("", "33.1", "", ""),
  "DeepAtt": ("", "37.7", "", ""),
  "DeepAtt+PosUnk": ("", "39.2", "", ""),
}
TABLE_3 = {
  "moe_2048_h": ("4.64", "26.03", "85", "8.7B"),
  "gnmt": ("5.25", "24.91", "214", "278M"),
  "gnmt, with RL": ("8.08", "24.66", "214", "278M"),
  "PBMT": ("", "20.7", "", ""),
  "DeepAtt": ("", "20.6", "", ""),
}
# Of production data: test perplexity and BLEU, and the rest of Table 2.
TABLE_4 = {
  "moe_2048_h": ("2.69", "36.57", "85", "8.7B"),
  "gnmt": ("2.87", "35.56", "214", "278M"),
}
# BLEU of GNMT for one pair, of GNMT for all, of the mixture for all.
TABLE_5 = {
  "fr-en": ("36.47", "34.40", "37.46"),
  "de-en": ("31.77", "31.17", "34.80"),
  "ja-en": ("23.41", "21.62", "25.91"),
  "ko-en": ("25.42", "22.87", "28.71"),
  "pt-en": ("44.40", "42.53", "46.13"),
  "es-en": ("38.00", "36.04", "39.39"),
  "en-fr": ("35.37", "34.00", "36.59"),
  "en-de": ("26.43", "23.15", "24.53"),
  "en-ja": ("23.66", "21.10", "22.78"),
  "en-ko": ("19.75", "18.41", "16.62"),
  "en-pt": ("38.40", "37.35", "37.90"),
  "en-es": ("34.50", "34.25", "36.21"),
}
# (w_importance, w_load) -> test perplexity, CV(Importance), CV(Load) and
# max(Load) / mean(Load).
TABLE_6 = {
  (0.0, 0.0): (39.8, 3.04, 3.01, 17.80),
  (0.2, 0.0): (35.6, 0.06, 0.17, 1.47),
  (0.0, 0.2): (35.7, 0.22, 0.04, 1.15),
  (0.1, 0.1): (35.6, 0.06, 0.05, 1.14),
  (0.01, 0.01): (35.7, 0.48, 0.11, 1.37),
  (1.0, 1.0): (35.7, 0.03, 0.02, 1.07),
}
# Of three experts of the encoder's mixture, what their contexts have in common.
TABLE_9 = {
  "expert 381": ("research, innovation",),
  "expert 752": ("'a' before a leading or important role",),
  "expert 2004": ("speed, rapid change",),
}


class Item(NamedTuple):
  """A table or figure of the paper.

  Attributes:
    about: what it shows.
    columns: of the paper's values.
    paper: the values, by row; none where the paper draws without digits.
    command: makes ours; "" where there is nothing to measure.
    results: stems of the committed results in results/.
    rows: the columns of the first result that name a row as `paper` does.
    ours: of `columns` those that the first result has, and its name for them.
    note: what else there is to say.
  """

  about: str
  columns: tuple[str, ...] = ()
  paper: Mapping[Any, Sequence[Any]] = {}
  command: str = ""
  results: tuple[str, ...] = ()
  rows: tuple[str, ...] = ("model",)
  ours: Mapping[str, str] = {}
  note: str = ""


_LM = ("after 10 epochs", "in the end", "ops, M", "parameters, M", "total, B")
_LM += ("dropout", "TFLOPS/GPU")
_RUN = "python -m experiments."
_CURVE = {
  "command": f"{_RUN}capacity_curve --text=FILES",
  "results": ("capacity_curve_text_models", "paper_counts"),
  "ours": {"after 10 epochs": "test"},
}
_UNSEEN = {
  "command": f"{_RUN}unseen_text --text=FILES",
  "results": ("unseen_text_text", "paper_counts"),
  "ours": {"a tenth": "test_of_tenth", "all": "test"},
}
_ANY_PAIRS = "the data is not public: any files of pairs in its place"


def _pair(pair: str, table: Mapping[str, Sequence[str]]) -> dict[str, Any]:
  return {
    "columns": ("test perplexity", "BLEU", "ops, M", "parameters"),
    "paper": {(pair, model): values for model, values in table.items()},
    "command": f"{_RUN}translation_capacity --pairs=en-fr=FILE,en-de=FILE",
    "results": ("translation_capacity_pairs", "paper_counts"),
    "rows": ("pair", "model"),
    "ours": {"test perplexity": "test", "BLEU": "bleu"},
  }


ITEMS = {
  "figure_1": Item(
    "the layer between two LSTMs", note="drawn in docs/architecture.md"
  ),
  "table_1": Item(
    "largest models of the 1B benchmark",
    ("hours", "K40s", *_LM),
    {name: (*given, *TABLE_7[name]) for name, given in TABLE_1.items()},
    **_CURVE,
    note=f"parameters and operations: {_RUN}paper_counts",
  ),
  "figure_2": Item(
    "perplexity over parameters at equal ops, and over ops",
    _LM,
    {name: TABLE_7[name] for name in TABLE_7 if name != "kneser_ney_5"},
    **_CURVE
    | {"results": ("capacity_curve_text_models", "compute_curve_text")},
    note=f"right: {_RUN}compute_curve --text=FILES",
  ),
  "figure_3": Item(
    "perplexity over parameters, on two amounts of unseen text",
    ("a tenth", "all"),
    {name: values[:2] for name, values in TABLE_8.items()},
    **_UNSEEN,
  ),
  "table_2": Item("English to French, WMT'14", **_pair("en-fr", TABLE_2)),
  "table_3": Item("English to German, WMT'14", **_pair("en-de", TABLE_3)),
  "table_4": Item(
    "English to French, Google's production data",
    **_pair("en-fr", TABLE_4),
    note=_ANY_PAIRS,
  ),
  "table_5": Item(
    "twelve directions in one model",
    ("GNMT, one pair", "GNMT, all", "mixture, all"),
    TABLE_5,
    f"{_RUN}multilingual --pairs=en-fr=FILE,en-de=FILE",
    ("multilingual_pairs", "paper_counts"),
    ("direction",),
    {"mixture, all": "bleu"},
    _ANY_PAIRS,
  ),
  "figure_4": Item(
    "perplexity over source words, 0 to 2048 experts",
    command=f"{_RUN}translation_curve --pairs=en-fr=FILE",
    note="the paper prints no digits; its curves end at Table 2's perplexity;"
    " not run yet",
  ),
  "table_6": Item(
    "weights of the balance losses",
    ("perplexity", "CV(importance)", "CV(load)", "max/mean load"),
    TABLE_6,
    f"{_RUN}balance_losses",
    ("balance_losses",),
    ("w_importance", "w_load"),
    {
      "perplexity": "test_perplexity",
      "CV(importance)": "cv_importance",
      "CV(load)": "cv_load",
      "max/mean load": "max_over_mean_load",
    },
  ),
  "table_7": Item("all models of the 1B benchmark", _LM, TABLE_7, **_CURVE),
  "table_8": Item(
    "100 billion words of news, one epoch",
    ("a tenth", "all", *_LM[2:5], "TFLOPS/GPU"),
    TABLE_8,
    **_UNSEEN,
    note="the data is not public: any files of text in its place",
  ),
  "table_9": Item(
    "contexts in which an expert has its largest gates",
    ("contexts",),
    TABLE_9,
    f"{_RUN}specialization --workdir=runs/translate",
    ("specialization_workdir", "specialization"),
    ("about",),
    note="of a mixture of one level or two",
  ),
}


def beside(item: Item) -> figures.Rows:
  """Yields the rows of an item: ours, and the paper's in brackets."""
  by_name = {}
  # Where several rows have a name the first is the mixture's.
  for row in figures.read(figures.RESULTS / f"{item.results[0]}.csv"):
    by_name.setdefault(tuple(row[name] for name in item.rows), row)
  paper = {
    name if isinstance(name, tuple) else (name,): values
    for name, values in item.paper.items()
  }
  # Models of ours that the paper does not have, for the same pair if of one.
  kinds = {name[:-1] for name in paper}
  others = [name for name in by_name if name[:-1] in kinds]
  for name in dict.fromkeys([*paper, *others]):
    ours = by_name.get(name, {})
    row = dict(zip(item.rows, name, strict=True))
    values = paper.get(name, [""] * len(item.columns))
    for column, value in zip(item.columns, values, strict=True):
      own = ours.get(item.ours.get(column))
      cells = ["" if own is None else str(own), f"({value})" * (value != "")]
      row[column] = " ".join(filter(None, cells))
    yield row


def about(item: Item) -> Iterator[str]:
  """Yields the lines of --list below an item's name."""
  if item.command:
    yield f"  {item.command}"
  for stem in item.results:
    note = json.loads((figures.RESULTS / f"{stem}.json").read_text())
    yield f"  results/{stem}.csv, {note['date'][:10]}"
  if item.note:
    yield f"  {item.note}"
  if item.paper:
    yield "  the paper's values:"
    rows = [
      {"": ", ".join(map(str, row)) if isinstance(row, tuple) else row}
      | dict(zip(item.columns, values, strict=True))
      for row, values in item.paper.items()
    ]
    yield textwrap.indent(harness.aligned(rows), "    ")


def main(argv: Sequence[str] | None = None) -> None:
  """Prints the tables, or what makes them."""
  parser = argparse.ArgumentParser(prog=f"{_RUN}paper_tables")
  parser.add_argument("--list", action="store_true", help="what makes each")
  items = {"nargs": "*", "metavar": "ITEM", "choices": [[], *ITEMS]}
  parser.add_argument("items", help="all by default", **items)
  args = parser.parse_args(argv)
  for name in args.items or ITEMS:
    item = ITEMS[name]
    if args.list or not item.ours:
      terminal.say("\n".join([f"{name}: {item.about}", *about(item)]))
    else:
      terminal.say(f"{name}: {item.about}: ours (the paper's)")
      terminal.say(harness.aligned(list(beside(item))))
    terminal.say("")


if __name__ == "__main__":
  main()
