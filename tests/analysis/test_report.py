"""The report: its numbers are those of the trace, and of the page."""

import html
import json
import re

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import CHROMIUM, main_of, needs_browser, opened, shown, text_of

from moejax.analysis import page, report, trace
from moejax.main import main
from moejax.training import run as run_lib

pytestmark = pytest.mark.usefixtures("one_device", "few_sizes")


def mixture(name, kind="top_k", k=2, factor=1.0, **more):
  fields = {
    "num_experts": 6,
    "group_size": 16,
    "experts.hidden": 4,
    "eval_capacity_factor": factor,
    "router": {"kind": kind, "k": k},
  }
  return {f"{name}.{field}": value for field, value in fields.items()} | more


LEVEL = "model.hierarchical_moe"
RUNS = {
  "lstm": ("sotu/moe_32", mixture("model.moe", "noisy_top_k")),
  "blocks": (
    "transformer/noisy_top_k",
    mixture(
      "model.blocks.moe",
      **{
        "model.blocks.num_layers": 4,
        "model.blocks.scan": True,
        "model.blocks.attention.num_heads": 2,
        "model.blocks.dense.hidden": 16,
      },
    ),
  ),
  "chosen": ("sotu/moe_32", mixture("model.moe", "balanced", factor=None)),
  "mixed": (
    "sotu/moe_32",
    {
      "model.moe.num_experts": 6,
      "model.moe.group_size": 16,
      "model.moe.eval_capacity_factor": 1.0,
      "model.moe.router": {"kind": "top_k", "k": 2},
      "model.moe.experts": [
        {"kind": "feed_forward", "num_experts": 4, "hidden": 4},
        {"kind": "identity", "num_experts": 2},
      ],
    },
  ),
  "levels": (
    "sotu/moe_32",
    {
      "model.layers": ("lstm", "hierarchical_moe", "lstm"),
      f"{LEVEL}.num_experts": 8,
      f"{LEVEL}.num_groups": 4,
      f"{LEVEL}.group_size": 16,
      f"{LEVEL}.eval_capacity_factor": 1.0,
      f"{LEVEL}.primary": {"kind": "top_k", "k": 2},
      f"{LEVEL}.secondary.eval_capacity_factor": 0.5,
      f"{LEVEL}.secondary.router": {"kind": "top_k", "k": 2},
      f"{LEVEL}.secondary.experts": {"kind": "feed_forward", "hidden": 4},
    },
  ),
}


SIDE = {"data.row_length": 32, "data.source_length": 32, "model.width": 8}
SIDE |= {"data.vocab_size": 290, "data.batch_size": 8}
TRANSLATOR = "translate_tiny", mixture("model.moe", "noisy_top_k") | SIDE
CASES = [*RUNS, "translator"]


@pytest.fixture(scope="module")
def reported(trained, translator, tmp_path_factory):
  """reported(case): what was told of a run, its trace, and the page."""
  known = {}

  def make(case):
    if case not in known:
      if case == "translator":
        workdir = translator(*TRANSLATOR, ("fr", "de"))
      else:
        workdir = trained(*RUNS[case])
      folder = tmp_path_factory.mktemp("report")
      to = folder / "report.html"
      told = report.write([workdir], to, sentences=5, without=4)
      about = trace.record(workdir, folder / "trace")
      parts = sorted((folder / "trace").glob("part-*.parquet"))
      rows = pa.concat_tables([pq.read_table(part) for part in parts])
      known[case] = workdir, told, about, rows.to_pylist(), to
    return known[case]

  return make


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_that_loops_count_from_the_trace(case, reported):
  workdir, told, about, rows, to = reported(case)
  assert json.loads(to.with_suffix(".json").read_text()) == told
  (run,) = told["runs"]
  near = dict(rel=1e-3, abs=1e-6)
  assert run["loss"] == pytest.approx(about["loss"], **near)
  assert [layer["name"] for layer in run["layers"]] == list(about["layers"])
  vocabulary = run_lib.load(workdir).tokenizer
  for layer in run["layers"]:
    own = [row for row in rows if row["layer"] == layer["name"]]
    assert layer["tokens"] == len(own)
    assert layer["side"] == "source" or len(own) == run["tokens"]
    E = layer["experts"]
    load, kept, importance = np.zeros((3, E))
    words = [{} for _ in range(E)]
    unchosen = lost = 0
    for row in own:
      edges = zip(row["experts"], row["gates"], row["dropped"], strict=True)
      for e, gate, full in edges:
        load[e] += 1
        kept[e] += not full
        importance[e] += gate
        words[e][row["id"]] = words[e].get(row["id"], 0) + 1
      unchosen += not row["experts"]
      lost += bool(row["experts"]) and all(row["dropped"])
    assert (layer["unchosen_tokens"], layer["lost_tokens"]) == (unchosen, lost)
    assert layer["edges"] == load.sum()
    by_expert = layer["by_expert"]
    loads = ("load", load), ("after_capacity", kept), ("importance", importance)
    for name, want in loads:
      found = [row[name] for row in by_expert]
      np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-6)
      balance = layer["balance"][name]
      assert balance["cv"] == pytest.approx(want.std() / want.mean(), **near)
      assert balance["max_over_mean"] == pytest.approx(
        want.max() / want.mean(), **near
      )
      assert balance["unused"] == (want == 0).sum()
      share = want[want > 0] / want.sum()
      entropy = -(share * np.log2(share)).sum()
      assert balance["entropy"] == pytest.approx(entropy, **near)
    full = sum(d["edges"] for d in layer["drops"] if "group" not in d["cause"])
    assert full == load.sum() - kept.sum()
    # Otherwise there were nothing to see.
    assert (full > 0) == (case not in ("chosen",))
    # What an expert knows, by its words.
    every = {}
    for each in words:
      for word, n in each.items():
        every[word] = every.get(word, 0) + n
    total = 0
    for row, each, n in zip(by_expert, words, load, strict=True):
      bits = sum(
        c / n * np.log2(c * load.sum() / (n * every[word]))
        for word, c in each.items()
      )
      total += n / load.sum() * bits
      assert row["bits"] == pytest.approx(bits, **near)
      spelt = {vocabulary.spelt(word): c for word, c in each.items()}
      for word, count, lift in row["tokens"]:
        assert spelt[word] == count and lift > 1
    told_of = {each["about"]: each for each in layer["knowledge"]}
    assert told_of["token"]["bits"] == pytest.approx(total, **near)
    assert {"position", "token before, beyond the token"} <= told_of.keys()
    assert ("language" in told_of) == (case == "translator")
    # The sentences that are shown.
    shown = run["text"][layer["side"]]
    assert len(shown) == len(layer["read"]) == 5
    number = {tuple(r["experts"]): r for r in own}
    for words_of, read in zip(shown, layer["read"], strict=True):
      assert len(words_of) == len(read)
      for edges in read:
        assert tuple(e for e, *_ in edges) in number


@pytest.mark.parametrize("case", CASES)
def test_gates_margins_positions_and_pairs_are_what_loops_count(case, reported):
  _, told, _, rows, _ = reported(case)
  near = dict(rel=1e-3, abs=1e-6)
  for layer in told["runs"][0]["layers"]:
    own = [row for row in rows if row["layer"] == layer["name"]]
    best = [max(row["gates"], default=0) for row in own]
    assert layer["largest_gate"] == pytest.approx(sum(best) / len(own), **near)
    margins = [r["margin"] for r in own if r["margin"] is not None]
    bars = layer["margins"]
    assert sum(bar["count"] for bar in bars) == len(margins)
    if margins:
      assert layer["margin"] == pytest.approx(np.median(margins), **near)
      for bar in bars[1:-1]:
        inside = sum(bar["low"] <= m < bar["high"] for m in margins)
        # Bounds have four digits on the page.
        assert abs(inside - bar["count"]) <= max(2, 0.02 * len(margins))
    else:
      assert layer["margin"] is None and case == "levels"
    load, in_bucket, joint, pairs = {}, {}, {}, {}
    for row in own:
      bucket = (row["position"] + 1).bit_length() - 1
      for e in row["experts"]:
        load[e] = load.get(e, 0) + 1
        in_bucket[bucket] = in_bucket.get(bucket, 0) + 1
        joint[e, bucket] = joint.get((e, bucket), 0) + 1
        for other in row["experts"]:
          if e < other:
            pairs[e, other] = pairs.get((e, other), 0) + 1
    edges = sum(load.values())
    found = {}
    for each in layer["positions"]:
      bucket = (each["from"] + 1).bit_length() - 1
      assert each["to"] == 2 * each["from"]
      found[each["expert"], bucket] = each["edges"]
      lift = each["edges"] * edges / (in_bucket[bucket] * load[each["expert"]])
      assert each["lift"] == pytest.approx(lift, **near)
    assert found == joint
    assert {(p["a"], p["b"]): p["tokens"] for p in layer["together"]} == pairs
    for p in layer["together"]:
      lift = p["tokens"] * len(own) / (load[p["a"]] * load[p["b"]])
      assert p["lift"] == pytest.approx(lift, **near)


def test_drops_are_told_by_cause(reported):
  _, told, about, rows, _ = reported("lstm")
  (layer,) = told["runs"][0]["layers"]
  S = about["layers"][layer["name"]]["tokens"]
  want = [0, 0]
  for row in rows:
    for edge, full in zip(row["edges"], row["dropped"], strict=True):
      want[edge // S] += full
  assert [each["edges"] for each in layer["drops"]] == want
  assert layer["drops"][1]["cause"] == "expert full, choice 2"
  _, told, about, rows, _ = reported("levels")
  (layer,) = told["runs"][0]["layers"]
  (levels,) = about["two_levels"].values()
  groups, experts = layer["drops"]
  assert groups["edges"] == levels["full"] > 0 and levels["groups"] == 4
  assert groups["part"] == pytest.approx(
    levels["full"] / levels["sent"], rel=1e-3
  )
  # Every token asks for two groups; those that are full are in no row.
  tokens = about["layers"][layer["name"]]
  assert levels["sent"] >= 2 * len(rows)
  in_groups = np.zeros(4)
  for row in rows:
    for e in row["experts"]:
      in_groups[e // 2] += 1
  assert layer["groups_of_experts"] == in_groups.tolist()
  assert tokens["levels"] == 2


def test_mixed_experts_are_told_by_kind(reported):
  _, told, *_ = reported("mixed")
  (layer,) = told["runs"][0]["layers"]
  first, second = layer["kinds"]
  assert (first["kind"], first["experts"]) == ("FeedForward", 4)
  assert (second["kind"], second["experts"]) == ("Identity", 2)
  load = [row["load"] for row in layer["by_expert"]]
  assert (first["load"], second["load"]) == (sum(load[:4]), sum(load[4:]))
  assert layer["by_expert"][4]["kind"] == "Identity"
  # An identity gives back what it gets, as the other does.
  pairs = {
    (each["a"], each["b"]): each["cosine"] for each in layer["alike_outputs"]
  }
  assert pairs[4, 5] == pytest.approx(1, abs=1e-3) != pairs[0, 1]


def test_what_is_lost_without_an_expert(reported, trained, tmp_path):
  """The loss of a trace in which the edges to it are left out."""
  workdir, told, *_ = reported("lstm")
  (layer,) = told["runs"][0]["layers"]
  without = {
    row["expert"]: row["loss_without"]
    for row in layer["by_expert"]
    if "loss_without" in row
  }
  assert len(without) == 4
  busiest = sorted(row["load"] for row in layer["by_expert"])[-4:]
  assert sorted(layer["by_expert"][e]["load"] for e in without) == busiest
  reader = trace.Reader(workdir)
  decided = list(reader.read(limit=64))
  own = reader.loss
  e = next(iter(without))

  def decide(batch):
    found = next(given)[1][layer["name"]]
    out = found["expert"] == e
    return {
      layer["name"]: trace.Assignment(
        np.where(out, 6, found["expert"]), np.where(out, 0, found["gate"])
      )
    }

  given = iter(decided)
  for _ in reader.read(decide, limit=len(decided)):
    pass
  tokens = sum(int(batch["mask"].sum()) for batch, _ in decided)
  if tokens <= 2048 + 128:
    assert without[e] == pytest.approx(reader.loss - own, rel=1e-3)
  assert reader.loss != own


def test_layers_that_are_asked_for(trained, reported, tmp_path):
  """They are told of as beside the others, and experts are taken away."""
  workdir, told, *_ = reported("blocks")
  name = told["runs"][0]["layers"][1]["name"]
  to = tmp_path / "a.html"
  told = report.write([workdir], to, layers=[name], sentences=5, without=3)
  (layer,) = told["runs"][0]["layers"]
  assert layer["name"] == name
  assert sum("loss_without" in row for row in layer["by_expert"]) == 3
  told = report.write([workdir], to, without=3)
  found = [
    sum("loss_without" in row for row in layer["by_expert"])
    for layer in told["runs"][0]["layers"]
  ]
  assert found == [2, 1]


def test_copies_are_alike(trained, tmp_path, monkeypatch):
  """Two experts of the same weights have a cosine of 1, of both kinds."""
  workdir = trained(*RUNS["lstm"])

  def copied(state):
    experts = state.params["layers_1"]["experts"]
    same = {n: x.at[3].set(x[1]) for n, x in experts.items()}
    own = state.params["layers_1"] | {"experts": same}
    return state._replace(params=state.params | {"layers_1": own})

  best = run_lib.best
  monkeypatch.setattr(run_lib, "best", lambda *args: copied(best(*args)))
  told = report.write([workdir], tmp_path / "a.html", without=0)
  (layer,) = told["runs"][0]["layers"]
  for what in ("weights", "outputs"):
    first, second = layer[f"alike_{what}"][:2]
    assert (first["a"], first["b"]) == (1, 3)
    assert first["cosine"] == pytest.approx(1, abs=1e-3)
    assert second["cosine"] < 0.99


# -- the page -----------------------------------------------------------------

# Text that would run, or turn the page around, if it were more than text.
EVIL = [
  '<script>document.title="run"</script>',
  '</script><img src=x onerror="document.title=1">',
  "{{ 7 * 7 }} ${alert(1)} <!--",
  "שלום עולם \u202egnp.exe",
  "e\u0301\u0302\u0303\u0304 नमस्ते 👩‍👩‍👧",
  "W" * 5000,
]


@needs_browser
@pytest.mark.parametrize(
  "case", ["lstm", "blocks", "mixed", "levels", "translator"]
)
def test_the_page_shows_the_numbers_of_the_json(case, reported, tmp_path):
  _, told, _, _, to = reported(case)
  (run,) = told["runs"]
  layer = run["layers"][-1]
  last = len(run["layers"]) - 1
  dom = opened(to, tmp_path, f"#layer={last}&sort=expert&up=1")
  plain, cells = text_of(dom)
  want = []
  for each in layer["balance"].values():
    want += [each["cv"], each["max_over_mean"], each["entropy"], each["unused"]]
  for each in layer["drops"]:
    want += [each["edges"], each["part"]]
  for each in layer["knowledge"]:
    want += [each["bits"], each["shuffled"], each["most"]]
  for each in layer["kinds"]:
    want += [each["experts"], each["load"], each["importance"]]
  assert all(shown(value) in cells for value in want)
  columns = ("expert", "load", "after_capacity", "importance", "smooth_load")
  rows = [[shown(row[name]) for name in columns] for row in layer["by_expert"]]
  step = 1 if layer["kinds"] else 0
  for row in rows:
    assert any(
      cells[i] == row[0] and cells[i + 1 + step : i + 5 + step] == row[1:]
      for i in range(len(cells))
    ), row
  for value in (run["loss"], run["perplexity"], run["tokens"]):
    assert shown(value) in plain
  charts = set(re.findall(r'data-chart="(\w+)"', dom))
  assert {"loads", "bits", "positions", "together"} <= charts
  assert ("labels" in charts) == (case == "translator")
  assert ("alike_outputs" in charts) == (case != "levels")
  assert main_of(dom).count("<svg") == len(charts)
  assert all(
    html.unescape(word) in plain for word in run["text"][layer["side"]][0]
  )


@needs_browser
def test_text_that_would_run_is_shown_as_it_is(reported, tmp_path):
  _, told, *_ = reported("lstm")
  told = json.loads(json.dumps(told))
  (run,) = told["runs"]
  run["workdir"] = EVIL[0]
  run["text"]["target"][0] = EVIL
  (layer,) = run["layers"]
  layer["read"][0] = [[[0, 0.5]]] * len(EVIL)
  layer["by_expert"][0]["tokens"] = [[text, 3, 1.5] for text in EVIL]
  layer["by_expert"][1]["contexts"] = [
    [0.5, *EVIL[i : i + 3]] for i in range(3)
  ]
  to = tmp_path / "evil.html"
  to.write_text(page.render(told))
  dom = opened(to, tmp_path)
  plain, _ = text_of(dom)
  for text in EVIL:
    assert plain.count(text) >= 2, text
  title = re.search("<title>(.*?)</title>", dom)[1]
  assert html.unescape(title) == f"Routing report: {EVIL[0]}"
  assert "<img" not in main_of(dom)


@needs_browser
def test_thousands_of_experts_are_searched_and_sorted(reported, tmp_path):
  _, told, *_ = reported("lstm")
  told = json.loads(json.dumps(told))
  (layer,) = told["runs"][0]["layers"]
  # No more experts are taken away than a picture has bars.
  some = [row.copy() for row in layer["by_expert"]]
  for row in some:
    row.pop("loss_without", None)
  layer["experts"] = 4096
  layer["by_expert"] = [
    some[e % 6] | {"expert": e, "bits": e / 4096} for e in range(4096)
  ]
  to = tmp_path / "many.html"
  to.write_text(page.render(told))
  plain, cells = text_of(opened(to, tmp_path, "#sort=bits&find=bits > 0.999"))
  assert "4 of 4,096 experts" in plain
  at = [i for i, cell in enumerate(cells) if cell in ("4,095", "4,092")]
  assert cells[at[0]] == "4,095" and cells[at[-1]] != cells[at[0]]
  plain, _ = text_of(opened(to, tmp_path, "#find=%2377"))
  assert "1 of 4,096 experts" in plain


def test_runs_side_by_side(reported, trained, tmp_path, capsys):
  one, two = trained(*RUNS["lstm"]), trained(*RUNS["chosen"])
  to = tmp_path / "both.html"
  flags = [f"--workdir={one}", f"--compare={two}", f"--out={to}", "--without=0"]
  assert main(["moejax", "report", *flags, "--sentences=3"]) == 0
  said = capsys.readouterr().out
  assert str(one) in said and f"{to} and both.json are written" in said
  told = json.loads(to.with_suffix(".json").read_text())
  assert [run["workdir"] for run in told["runs"]] == [str(one), str(two)]
  if CHROMIUM:
    plain, _ = text_of(opened(to, tmp_path))
    assert str(one) in plain and str(two) in plain


def test_files_are_told_apart(trained, tmp_path, capsys):
  """Experts that read by position know the file whose lines are long."""
  workdir = trained(*RUNS["lstm"])
  (tmp_path / "a.txt").write_text("the\n" * 50)
  (tmp_path / "b.txt").write_text("of the people of the Union\n" * 30)
  to = tmp_path / "report.html"
  paths = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
  told = report.write([workdir], to, files=paths, without=0)
  (layer,) = told["runs"][0]["layers"]
  told_of = {each["about"]: each for each in layer["knowledge"]}
  assert 0 < told_of["file"]["bits"] <= told_of["file"]["most"]
  assert layer["tokens"] == 50 * 2 + 30 * 7
  # Every edge is of a file, and an expert's lifts come from its own.
  rows = layer["labels"]["file"]
  assert {row["label"] for row in rows} == {*paths}
  of_file = {path: 0 for path in paths}
  for row in rows:
    of_file[row["label"]] += row["edges"]
  assert of_file == {paths[0]: 2 * 100, paths[1]: 2 * 210}
  for row in rows:
    load = layer["by_expert"][row["expert"]]["load"]
    part = row["edges"] / load / (of_file[row["label"]] / layer["edges"])
    assert row["lift"] == pytest.approx(part, rel=1e-3)


def test_what_cannot_be_reported_is_refused(trained, tmp_path, capsys):
  workdir = trained(*RUNS["lstm"])

  def refuse(said, *flags, status=1):
    assert main(["moejax", "report", *flags]) == status
    assert said in capsys.readouterr().err

  own = f"--workdir={workdir}"
  out = f"--out={tmp_path / 'a.html'}"
  refuse("is no .html; name it so", own, f"--out={tmp_path / 'a.pdf'}")
  refuse("is no folder; make it", own, f"--out={tmp_path / 'no' / 'a.html'}")
  refuse("has no mixture layer_7; choose of", own, out, "--layers=layer_7")
  refuse("no run was made there", f"--workdir={tmp_path / 'none'}", out)
  refuse("exclude each other", own, "--data=a", "--split=test", status=2)
  dense = trained("sotu/moe_1_wide", {"model.one_expert.hidden": 8})
  refuse("is dense: it has no mixture", f"--workdir={dense}", out)
  (tmp_path / "other.txt").write_text("xyzzy plugh\n" * 20)
  text = f"--data={tmp_path / 'other.txt'}"
  assert main(["moejax", "report", own, out, text, "--without=0"]) == 0
  assert "unknown to the vocabulary of the run" in capsys.readouterr().err
  report_largest, report._LARGEST = report._LARGEST, 1000
  try:
    refuse("narrow it by --layers=", own, out, "--without=0")
  finally:
    report._LARGEST = report_largest
  assert jax.devices()
