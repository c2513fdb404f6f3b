"""Routing traces: they tell what was decided, and are run again to the bit."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moejax import losses, sharding
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
}


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def recorded(trained, tmp_path_factory):
  """recorded(case): the workdir of a run, and a trace of its test text."""
  known = {}

  def make(case):
    if case not in known:
      workdir = trained(*RUNS[case])
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
    for layer, routing in zip(found, jax.device_get(decisions), strict=True):
      layer += tokens_of(routing, batch)
  return found, loss / words


def tokens_of(routing, batch):
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
  L = batch["inputs"].shape[1]
  found = []
  for n in range(G * S):
    row, place = divmod(n, L)
    if not batch["mask"][row, place]:
      continue
    position = 0
    while place - position > 0 and not batch["start"][row, place - position]:
      position += 1
    own = tokens.get(n, [])
    experts, gates, full = ([edge[i] for edge in own] for i in range(3))
    logits = routing.logits[n // S, n % S]
    others = np.delete(logits, experts)
    margin = None
    if experts and others.size:
      margin = logits[experts].min() - others.max()
    about = batch["inputs"][row, place], position
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
    assert (dropped > 0) == (case in ("lstm", "blocks"))
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
  want = run.evaluate_run(one, "test", say=lambda said: None)["loss"]
  np.testing.assert_allclose(found["k=1"], want, rtol=1e-5)
  assert len({*found.values()}) == 4
  flag = "--counterfactual=k=1,uniform"
  assert main(["moejax", "eval", f"--workdir={workdir}", flag]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[-2].startswith(f"k=1: {found['k=1']:.4f} nats a token")
  assert f"({found['uniform'] - own:+.4f} nats)" in lines[-1]


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


def test_what_cannot_be_traced_is_refused(recorded, tmp_path, capsys):
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
  refuse("unknown choice 'k=0'", "--counterfactual=k=0")
  flags = [f"--replay={folder}", f"--record={tmp_path / 'new'}"]
  assert main(["moejax", "eval", f"--workdir={workdir}", *flags]) == 2
