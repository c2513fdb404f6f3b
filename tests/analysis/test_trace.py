"""Routing traces: they tell what was decided, and are run again to the bit."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import storage

from moejax import bucket, losses, sharding
from moejax.analysis import trace
from moejax.data import batches
from moejax.main import main
from moejax.moe import ROUTING
from moejax.training import run

LSTM = "model.moe"
BLOCKS = "model.blocks.moe"
SMALL_BLOCKS = {
  "model.blocks.num_layers": 4,
  "model.blocks.attention.num_heads": 2,
  "model.blocks.dense.hidden": 16,
}


def mixture(name, factor=1.0, **router):
  fields = {
    "num_experts": 8,
    "group_size": 16,
    "experts.hidden": 4,
    "eval_capacity_factor": factor,
    "router": router,
  }
  return {f"{name}.{field}": value for field, value in fields.items()}


def lstm(**router):
  return "sotu/moe_32", mixture(LSTM, **router)


def blocks(more, **router):
  fields = SMALL_BLOCKS | mixture(BLOCKS, **router) | more
  return "transformer/noisy_top_k", fields


def pairs(name, *sides, **more):
  """A run that translates, with mixtures in its encoder and its decoder."""
  small = {"data.vocab_size": 280, "data.source_length": 32} | more
  small |= {"data.row_length": 32, "data.batch_size": 8, "model.width": 8}
  for side in sides:
    small |= mixture(side, kind="noisy_top_k", k=2)
  return name, small


DROPLESS = {
  f"{BLOCKS}.eval_capacity_factor": None,
  f"{BLOCKS}.dispatch": "ragged",
}
RUNS = {
  "lstm": lstm(kind="noisy_top_k", k=2),
  "blocks": blocks({"model.blocks.scan": True}, kind="switch"),
  "balanced": blocks({}, kind="balanced", k=2),
  "experts choose": blocks(
    {"model.looks_ahead": True}, kind="expert_choice", k=2
  ),
  "dropless": blocks(DROPLESS, kind="softmax_top_k", k=3),
  "translation": pairs("translate_tiny", "model.moe"),
  "pair of blocks": pairs(
    "transformer/translate_tiny", "model.encoder.moe", "model.decoder.moe"
  ),
}
TRANSLATE = ("translation", "pair of blocks")


pytestmark = pytest.mark.usefixtures("one_device", "few_sizes")


@pytest.fixture(scope="module")
def recorded(trained, translator, tmp_path_factory):
  """recorded(case): the workdir of a run, and a trace of its test text."""
  known = {}

  def make(case):
    if case not in known:
      make_run = translator if case in TRANSLATE else trained
      workdir = make_run(*RUNS[case])
      folder = tmp_path_factory.mktemp("trace") / "trace"
      trace.record(workdir, folder)
      known[case] = workdir, folder
    return known[case]

  return make


def read(folder):
  return pa.concat_tables(
    pq.read_table(path) for path in sorted(folder.glob("part-*.parquet"))
  )


def recount(workdir):
  """What the model itself reports, by loops: layer by layer, its tokens.

  A token is (id, position, experts, gates, who is full, margin).
  """
  context = run.open_run(workdir)
  built = context.session
  params = run.best(workdir, built).params
  found, loss, words = [], 0.0, 0
  size = built.experiment.rows_at_once

  @jax.jit
  def apply(params, batch):
    options = {"train": False, "mutable": [ROUTING], "method": "loss"}
    return built.model.apply({"params": params}, batch, **options)

  for batch in batches.eval_batches(context.rows("test"), size):
    with sharding.use(built.layout, built.mesh):
      nats, sown = apply(params, jax.tree.map(jnp.asarray, batch))
    loss, words = loss + float(nats.sum()), words + batch["mask"].sum()
    decisions = losses.routings(sown[ROUTING])
    found = found or [[] for _ in decisions]
    for n, routing in enumerate(jax.device_get(decisions)):
      # The encoder comes last, where there is one.
      source = n and "source" in batch
      names = "source", "source_start", "source_segment"
      names = names if source else ("inputs", "start", "mask")
      found[n] += tokens_of(routing, *map(batch.get, names))
  return found, loss / words


def tokens_of(routing, ids, start, real):
  G, S, E = routing.logits.shape
  edges = routing.assignment
  token = np.asarray(jax.tree.map(jnp.asarray, edges).tokens(S))
  tokens = {}
  room = routing.count - routing.dropped
  for g in range(G):
    visits = np.zeros(E)
    for a in range(edges.expert.shape[1]):
      if (e := edges.expert[g, a]) < E:
        visits[e] += 1
        own = tokens.setdefault(g * S + token[g, a], [])
        own.append((e, edges.gate[g, a], visits[e] > room[g, e]))
  L = ids.shape[1]
  found = []
  for n in range(G * S):
    row, place = divmod(n, L)
    if not real[row, place]:
      continue
    position = 0
    while place - position > 0 and not start[row, place - position]:
      position += 1
    own = tokens.get(n, [])
    experts, gates, full = ([edge[i] for edge in own] for i in range(3))
    logits = routing.logits[n // S, n % S]
    others = np.delete(logits, experts)
    margin = None
    if experts and others.size:
      margin = logits[experts].min() - others.max()
    about = ids[row, place], position
    found.append((*about, experts, gates, full, margin))
  return found


@pytest.mark.parametrize("case", RUNS)
def test_a_trace_is_what_the_model_decides_and_replays_to_the_bit(
  case, recorded, capsys
):
  workdir, folder = recorded(case)
  about = json.loads((folder / trace.ABOUT).read_text())
  assert trace.replay(workdir, folder) == about["loss"]
  want, loss = recount(workdir)
  np.testing.assert_allclose(about["loss"], loss, rtol=1e-5)
  table = read(folder)
  assert table.schema.equals(trace.SCHEMA)
  assert len(about["layers"]) == len(want) == (1 if case == "lstm" else 2)
  for name, layer in zip(sorted(about["layers"]), want, strict=True):
    rows = [row for row in table.to_pylist() if row["layer"] == name]
    assert [row["token"] for row in rows] == list(range(len(layer)))
    dropped = 0
    for row, (id_, position, *lists, margin) in zip(rows, layer, strict=True):
      assert (row["id"], row["position"]) == (id_, position)
      experts, gates, full = lists
      assert row["experts"] == experts and row["dropped"] == full
      np.testing.assert_allclose(row["gates"], gates, rtol=2e-4, atol=1e-6)
      dropped += sum(full)
      if margin is None:
        assert row["margin"] is None
      else:
        np.testing.assert_allclose(row["margin"], margin, rtol=1e-3, atol=1e-4)
    # Otherwise there were nothing to see.
    assert (dropped > 0) == (case in ("lstm", "blocks", *TRANSLATE))
  if case in TRANSLATE:
    # An evaluation would translate all of it.
    return
  assert main(["moejax", "eval", f"--workdir={workdir}"]) == 0
  said = capsys.readouterr().out
  flag = f"--replay={folder}"
  assert main(["moejax", "eval", f"--workdir={workdir}", flag]) == 0
  perplexity = f"perplexity {np.exp(about['loss']):,.2f}"
  assert perplexity in said and perplexity in capsys.readouterr().out


def test_other_decisions_are_followed(recorded, tmp_path):
  """Experts of a trace that are changed are those that read the tokens."""
  workdir, folder = recorded("lstm")
  other = shutil.copytree(folder, tmp_path / "other")
  (path,) = other.glob("part-*.parquet")
  table = pq.read_table(path)
  turned = [[(e + 1) % 8 for e in row] for row in table["experts"].to_pylist()]
  at = table.schema.get_field_index("experts")
  table = table.set_column(
    at, table.schema.field(at), pa.array(turned, pa.list_(pa.int32()))
  )
  pq.write_table(table, path)
  own = json.loads((folder / trace.ABOUT).read_text())["loss"]
  assert trace.replay(workdir, other) != pytest.approx(own, abs=1e-4)


def test_parts_are_small_and_follow_each_other(recorded, tmp_path, monkeypatch):
  workdir, folder = recorded("lstm")
  monkeypatch.setattr(trace, "_PART", 100)
  about = trace.record(workdir, tmp_path / "parts")
  assert len(list((tmp_path / "parts").glob("part-*.parquet"))) > 2
  assert read(tmp_path / "parts").equals(read(folder))
  assert trace.replay(workdir, tmp_path / "parts") == about["loss"]


def test_counterfactuals_cost_what_such_a_model_does(recorded, trained, capsys):
  """k=1 is the run with another config; what is drawn anew differs."""
  workdir, folder = recorded("lstm")
  found = trace.counterfactual(workdir, ["k=1", "k=2", "uniform", "training"])
  own = json.loads((folder / trace.ABOUT).read_text())["loss"]
  assert found["own"] == found["k=2"] == own
  one = trained(*lstm(kind="noisy_top_k", k=1))
  want = run.evaluate_run(one, "test")["loss"]
  np.testing.assert_allclose(found["k=1"], want, rtol=1e-5)
  assert len({*found.values()}) == 4
  flag = "--counterfactual=k=1,uniform"
  assert main(["moejax", "eval", f"--workdir={workdir}", flag]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[-2].startswith(f"k=1: {found['k=1']:.4f} nats a token")
  assert f"({found['uniform'] - own:+.4f} nats)" in lines[-1]


def test_another_runs_decisions_cost_what_replaying_them_does(
  recorded, trained, tmp_path, capsys
):
  workdir, own = recorded("lstm")
  other = tmp_path / "other"
  trace.record(trained(*lstm(kind="softmax_top_k", k=2)), other)
  loss = trace.replay(workdir, other)
  choices = ",".join(map(str, (other, own, other)))
  flags = [f"--workdir={workdir}", f"--counterfactual={choices}"]
  assert main(["moejax", "eval", *flags]) == 0
  said = capsys.readouterr().out.splitlines()[-3:]
  first = json.loads((own / trace.ABOUT).read_text())["loss"]
  assert said[0].startswith(f"own: {first:.4f} nats a token")
  assert said[1].startswith(f"{other}: {loss:.4f} nats a token")
  assert said[1].endswith(f"({loss - first:+.4f} nats)")
  # A run's own trace changes nothing.
  assert said[2] == f"{own}{said[0].removeprefix('own')}"
  assert f"{loss - first:+.4f}" != "+0.0000"


def test_two_levels_are_recorded_not_replayed(trained, tmp_path):
  level = "model.hierarchical_moe"
  fields = {
    "model.layers": ("lstm", "hierarchical_moe", "lstm"),
    f"{level}.num_experts": 8,
    f"{level}.num_groups": 4,
    f"{level}.group_size": 16,
    f"{level}.primary": {"kind": "top_k", "k": 2},
    f"{level}.secondary.router": {"kind": "top_k", "k": 2},
    f"{level}.secondary.experts": {"kind": "feed_forward", "hidden": 4},
  }
  workdir = trained("sotu/moe_32", fields)
  about = trace.record(workdir, tmp_path / "trace")
  ((name, layer),) = about["layers"].items()
  assert layer["levels"] == 2 and layer["experts"] == 8
  for row in read(tmp_path / "trace").to_pylist():
    assert all(0 <= expert < 8 for expert in row["experts"])
    assert len({*row["experts"]}) == len(row["experts"]) <= 4
    assert row["margin"] is None and sum(row["gates"]) <= 1 + 1e-5
  with pytest.raises(ValueError, match=f"{name} decides at two levels"):
    trace.replay(workdir, tmp_path / "trace")


def change(folder, to, how):
  """A copy of a trace whose only part, or trace.json, is another."""
  shutil.copytree(folder, to)
  (part,) = to.glob("part-*.parquet")
  how(part, to / trace.ABOUT)
  return to


def rewrite(edit):
  """Writes the rows of a part anew, edited one by one; False leaves one out."""

  def how(part, about):
    del about
    rows = pq.read_table(part).to_pylist()
    rows = [row for n, row in enumerate(rows) if edit(n, row) is not False]
    pq.write_table(pa.Table.from_pylist(rows, trace.SCHEMA), part)

  return how


def at_5(column, value):
  def edit(n, row):
    if n == 5:
      row[column] = value

  return rewrite(edit)


def exchange(n, row):
  """Gives two tokens that follow each other each other's edges."""
  if n in (5, 6):
    row["edges"] = [edge + 11 - 2 * n for edge in row["edges"]]


def swapped(part, about):
  del about
  table = pq.read_table(part)
  pq.write_table(pa.concat_tables([table[9:], table[:9]]), part)


def cut(part, about):
  del about
  part.write_bytes(part.read_bytes()[:-100])


def bent(part, about):
  """Damages the pages, not what the end of the file says of them."""
  del about
  content = bytearray(part.read_bytes())
  content[8:400] = bytes(392)
  part.write_bytes(content)


def narrow(part, about):
  del about
  pq.write_table(pq.read_table(part).drop_columns(["edges"]), part)


def noted(**values):
  def how(part, about):
    del part
    about.write_text(json.dumps(json.loads(about.read_text()) | values))

  return how


DAMAGE = {
  "a row less": (rewrite(lambda n, row: n != 5), "rows of"),
  "no part": (lambda part, about: part.unlink(), "has 0 rows of"),
  "a part more": (
    lambda part, about: shutil.copy(part, part.with_name("part-00001.parquet")),
    "rows of",
  ),
  "rows elsewhere": (swapped, "do not follow each other"),
  "another layer": (at_5("layer", "moe"), "do not follow each other"),
  "another token": (at_5("id", 0), "do not follow each other"),
  "an expert too many": (at_5("experts", [0, 8]), "of 8 experts"),
  "an expert below": (at_5("experts", [0, -1]), "of 8 experts"),
  "an edge too many": (at_5("edges", [0, 32]), "groups of 32 edges"),
  "edges exchanged": (rewrite(exchange), "cannot make"),
  "one edge twice": (at_5("edges", [5, 5]), "cannot make"),
  "a list that is short": (at_5("gates", [1.0]), "cannot make"),
  "gates that are no numbers": (at_5("gates", [np.nan, np.nan]), "loss .* nan"),
  "a column less": (narrow, "its columns are not layer string"),
  "cut short": (cut, r"part-00000.parquet is damaged, or not of a trace \("),
  "damaged": (bent, r"part-00000.parquet is damaged, or not of a trace \("),
  "no JSON": (
    lambda part, about: about.write_text("{"),
    "trace.json is no JSON",
  ),
  "of another version": (noted(layers={"moe": {}}), "not of a trace of this"),
}


@pytest.fixture(scope="module")
def readers():
  """A run is opened once for all damages."""
  return functools.cache(trace.Reader)


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_trace_is_refused(
  case, recorded, tmp_path, readers, monkeypatch
):
  monkeypatch.setattr(trace, "Reader", readers)
  workdir, folder = recorded("lstm")
  how, said = DAMAGE[case]
  damaged = change(folder, tmp_path / "damaged", how)
  with pytest.raises((ValueError, FloatingPointError), match=said):
    trace.replay(workdir, damaged)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "full")])
def test_what_did_not_end_is_no_trace(error, recorded, tmp_path, monkeypatch):
  workdir, _ = recorded("lstm")
  calls, table = [], trace._table

  def fail(*given):
    calls.append(given)
    if len(calls) == 3:
      raise error
    return table(*given)

  monkeypatch.setattr(trace, "_table", fail)
  with pytest.raises(type(error)):
    trace.record(workdir, tmp_path / "trace")
  assert [p.name for p in (tmp_path / "trace").iterdir()] == [
    "part-00000.parquet"
  ]
  with pytest.raises(ValueError, match="no whole trace"):
    trace.replay(workdir, tmp_path / "trace")


def test_a_run_in_a_bucket_is_traced(recorded, tmp_path):
  workdir, folder = recorded("lstm")
  with storage.serve() as served, pytest.MonkeyPatch.context() as patch:
    for name, value in served.environment().items():
      patch.setenv(name, value)
    for path in workdir.rglob("*"):
      if path.is_file():
        name = path.relative_to(workdir.parent).as_posix()
        served.put(name, path.read_bytes())
    there = bucket.path(f"gs://{storage.NAME}/{workdir.name}")
    about = trace.record(there, tmp_path / "trace")
    assert about == json.loads((folder / trace.ABOUT).read_text())
    assert read(tmp_path / "trace").equals(read(folder))


def test_what_cannot_be_traced_is_refused(
  recorded, trained, tmp_path, capsys, monkeypatch
):
  workdir, folder = recorded("lstm")
  other, _ = recorded("balanced")

  def refuse(said, *flags, workdir=workdir):
    assert main(["moejax", "eval", f"--workdir={workdir}", *flags]) == 1
    assert said in capsys.readouterr().err

  refuse("is not empty; give a new folder", f"--record={folder}")
  refuse("no whole trace, it has no trace.json", f"--replay={tmp_path}")
  text = tmp_path / "text.txt"
  text.write_text("one two\n")
  refuse("is of another text", f"--replay={folder}", f"--data={text}")
  refuse("but the model has", f"--replay={folder}", workdir=other)
  new = f"--record={tmp_path / 'new'}"
  refuse("lies in a bucket", "--record=gs://bucket/trace")
  dense = trained("transformer/dense", SMALL_BLOCKS)
  refuse("is dense: it has no mixture", new, workdir=dense)
  moved = shutil.copytree(workdir, tmp_path / "moved")
  (moved / "text.json").write_text('{"test": "other"}')
  refuse("the text of test has changed since", new, workdir=moved)
  with monkeypatch.context() as patch:
    patch.setattr(jax, "process_count", lambda: 2)
    refuse("2 processes read the text, but a trace is of one", new)
  assert not (tmp_path / "new").exists()
  refuse("unknown choice 'k=0'", "--counterfactual=k=0")
  refuse("it has no trace.json", f"--counterfactual=k=1,{tmp_path}")
  flags = [f"--replay={folder}", new]
  assert main(["moejax", "eval", f"--workdir={workdir}", *flags]) == 2
