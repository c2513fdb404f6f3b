"""From dense to sparse, and between sparse ones: what stays, and what goes."""

import functools
import json
import re

import jax
import numpy as np
import pytest
import random_runs
from flax.traverse_util import flatten_dict

from moejax import workdir as workdir_lib
from moejax.data import batches
from moejax.main import main
from moejax.training import run, session, upcycle

WIDE = {"model.one_expert.hidden": 16}
MIXED = {"model.moe.num_experts": 8, "model.moe.group_size": 16}
BLOCKS = {
  "model.blocks.num_layers": 4,
  "model.blocks.attention.num_heads": 2,
  "model.blocks.dense.hidden": 16,
}
SPARSE = BLOCKS | {
  "model.blocks.moe.num_experts": 8,
  "model.blocks.moe.group_size": 16,
}
SCAN = {"model.blocks.scan": True}


def gated(*sections):
  return {f"model.blocks.{section}.gated": True for section in sections}


def lstm(hidden, **router):
  fields = {"model.moe.experts.hidden": hidden, "model.moe.router": router}
  return "sotu/moe_32", MIXED | fields


def blocks(hidden, router, **more):
  name = "model.blocks.moe"
  fields = {f"{name}.experts.hidden": hidden, f"{name}.router": router}
  return "transformer/noisy_top_k", SPARSE | fields | more


# And three experts do not divide over eight.
pytestmark = pytest.mark.usefixtures("one_device", "few_sizes")


def restored(workdir):
  experiment = run.recall(workdir)
  vocabulary = workdir_lib.vocabulary(experiment.tokenizer, workdir)
  built = session.build(experiment, len(vocabulary))
  return built, run.best(workdir, built)


@functools.cache
def log_p(workdir):
  """Of words of the validation, where experts have room for all."""
  built, found = restored(workdir)
  rows = run.open_run(workdir).rows("validation")
  batch = next(batches.eval_batches(rows, 8))
  model = built.model.for_decoding()
  apply = jax.jit(lambda p, b: model.apply({"params": p}, b, method="loss"))
  return -np.asarray(apply(found.params, batch))[batch["mask"]]


def flat(workdir):
  return flatten_dict(jax.device_get(restored(workdir)[1].params), sep="/")


def made_from(workdir):
  return json.loads((workdir / upcycle.MADE_FROM_FILE).read_text())


ONE = ("sotu/moe_1_wide", WIDE)
DENSE = ("transformer/dense", BLOCKS)
TOP_2 = {"kind": "top_k", "k": 2}
KEPT = {
  "copies": (ONE, lstm(16, kind="noisy_top_k", k=2)),
  "parts of a copy are chosen together": (ONE, lstm(4, kind="top_k", k=4)),
  "parts of two copies": (ONE, lstm(8, kind="sigmoid", k=4)),
  "all experts": (ONE, lstm(2, kind="softmax")),
  "to a stack of blocks": (
    ("transformer/dense", BLOCKS | gated("dense")),
    blocks(16, TOP_2, **SCAN, **gated("dense", "moe.experts")),
  ),
  "from a stack of blocks": (
    ("transformer/dense", BLOCKS | SCAN),
    blocks(8, {"kind": "gshard_top_2"}),
  ),
}


@pytest.mark.parametrize("name", KEPT)
def test_upcycling_keeps_the_function(name, trained, config, tmp_path):
  dense, sparse = KEPT[name]
  source, workdir = trained(*dense), tmp_path / "run"
  report = upcycle.upcycle(
    source, random_runs.experiment_of(config(*sparse)), workdir
  )
  assert report["function_kept"] and not report["why_not"]
  assert report == made_from(workdir)
  assert report["perplexity_after"] == pytest.approx(
    report["perplexity_before"], rel=1e-6
  )
  before, after = log_p(source), log_p(workdir)
  np.testing.assert_allclose(after, before, 0, 1e-6 * np.abs(before).max())
  assert restored(workdir)[1].step == 0


SPLIT = {
  "top_k": lstm(8, kind="top_k", k=2),
  "sigmoid in a stack": blocks(8, {"kind": "sigmoid", "k": 2}, **SCAN),
  "thresholds": lstm(8, kind="balanced", k=2),
  "average thresholds": lstm(8, kind="expert_threshold", k=2),
}


@pytest.mark.parametrize("name", SPLIT)
def test_splitting_keeps_the_function(name, trained, tmp_path):
  workdir = tmp_path / "run"
  report = upcycle.split(trained(*SPLIT[name]), workdir, 2)
  assert report["function_kept"]
  model = run.recall(workdir).values["model"]
  section = model.get("blocks", model)["moe"]
  assert section["num_experts"] == 16 and section["experts"]["hidden"] == 4
  assert section["router"]["k"] == 4
  for made in report["experts"].values():
    assert [each["of"] for each in made] == [[n // 2] for n in range(16)]


def test_merging_copies_keeps_the_function(trained, config, tmp_path):
  copies, merged = tmp_path / "copies", tmp_path / "merged"
  sparse = random_runs.experiment_of(config(*lstm(16, kind="top_k", k=2)))
  upcycle.upcycle(trained(*ONE), sparse, copies)
  report = upcycle.merge(copies, merged, 3)
  assert report["function_kept"]
  (made,) = report["experts"].values()
  assert sorted(e for each in made for e in each["of"]) == [*range(8)]
  old, new = flat(copies), flat(merged)
  kernels = (f["layers_1/router/gate/kernel"] for f in (old, new))
  before, after = kernels
  for number, each in enumerate(made):
    assert sum(each["shares"]) == pytest.approx(1)
    mean = before[:, each["of"]] @ np.float32(each["shares"])
    np.testing.assert_allclose(after[:, number], mean, rtol=1e-5)


def alike(columns, load, left):
  """Groups of columns, the two nearest of which are joined, by loops."""
  groups = [[n] for n in range(columns.shape[1])]
  while len(groups) > left:
    best = (-2, None)
    for i, one in enumerate(groups):
      for j in range(i):
        a, b = (
          sum(load[n] * columns[:, n] for n in g) for g in (groups[j], one)
        )
        cosine = a @ b / np.sqrt(a @ a) / np.sqrt(b @ b)
        best = max(best, (cosine, (j, i)))
    j, i = best[1]
    groups[j] += groups.pop(i)
  return sorted(sorted(g) for g in groups)


def numpy_visits(workdir):
  """Load, and sums of gate times norm, of an LSTM's mixture, by loops."""
  built, found = restored(workdir)
  rows = run.open_run(workdir).rows("validation")
  E, model = 8, built.model.for_decoding()
  load, norms = np.zeros(E), np.zeros(E)
  params = jax.device_get(found.params)
  (kernel,) = params["layers_1"]["router"]["gate"].values()
  experts = params["layers_1"]["experts"]

  @jax.jit
  def outputs(batch):
    given = {"params": found.params}, batch
    _, seen = model.apply(*given, capture_intermediates=True)
    return seen["intermediates"]

  four = list(batches.eval_batches(rows, 8))[:4]
  for batch in four:
    seen = outputs(batch)
    x = seen["embed"]["__call__"][0] + seen["layers_0"]["__call__"][0]
    for row in np.asarray(x, np.float64)[batch["mask"]]:
      logits = row @ kernel
      chosen = np.argsort(-logits)[:2]
      gates = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
      for expert, gate in zip(chosen, gates, strict=True):
        hidden = np.maximum(row @ experts["w_in"][expert], 0)
        y = hidden @ experts["w_out"][expert]
        load[expert] += 1
        norms[expert] += gate * np.sqrt(y @ y)
  return load, norms


def test_scores_are_those_of_loops(trained, tmp_path):
  """And so are the groups that are merged, by load."""
  source = trained(*SPLIT["top_k"])
  load, norms = numpy_visits(source)
  wanted = {"load": load, "reap": norms / np.maximum(load, 1)}
  old = flat(source)
  for by, score in wanted.items():
    workdir = tmp_path / by
    report = upcycle.prune(source, workdir, 3, by)
    (found,) = report["scores"].values()
    np.testing.assert_allclose(found, score, rtol=1e-4)
    best = sorted(np.argsort(-score)[:3])
    assert [each["of"] for each in report["experts"]["layers_1"]] == [
      [n] for n in best
    ]
    new = flat(workdir)
    for name, array in new.items():
      axis = 0 if "experts" in name else old[name].ndim - 1
      picked = "experts" in name or "router" in name
      kept = old[name].take(best, axis) if picked else old[name]
      np.testing.assert_array_equal(array, kept)
    assert not report["function_kept"] and report["why_not"]
  # Another choice than by load, or nothing would be shown.
  assert {*np.argsort(-load)[:3]} != {*np.argsort(-wanted["reap"])[:3]}
  report = upcycle.merge(source, tmp_path / "merged", 3)
  made = report["experts"]["layers_1"]
  groups = alike(old["layers_1/router/gate/kernel"], load, 3)
  assert [each["of"] for each in made] == groups
  new = flat(tmp_path / "merged")
  for number, each in enumerate(made):
    shares = load[each["of"]] / load[each["of"]].sum()
    np.testing.assert_allclose(each["shares"], shares, rtol=1e-6)
    for name in ("w_in", "w_out"):
      mean = np.tensordot(
        shares, old[f"layers_1/experts/{name}"][each["of"]], 1
      )
      got = new[f"layers_1/experts/{name}"][number]
      np.testing.assert_allclose(got, mean, rtol=1e-4, atol=1e-6)


def moments(opt_state):
  """Arrays by (moment, parameter)."""
  found = {}
  for path, leaf in jax.tree.leaves_with_path(jax.device_get(opt_state)):
    text = jax.tree_util.keystr(path)
    kind = "mu" if ".mu" in text else "nu" if ".nu" in text else "count"
    found[kind, "/".join(re.findall(r"\['([^']+)'\]", text))] = leaf
  return found


def test_moments_are_carried_and_drawn_units_forgotten(
  trained, config, tmp_path
):
  wide = {"model.one_expert.hidden": 64, "model.one_expert.gated": True}
  name, fields = lstm(64, kind="top_k", k=2)
  fields = fields | {"model.moe.experts.gated": True}
  sparse = random_runs.experiment_of(config(name, fields))
  dense, workdir = trained("sotu/moe_1_wide", wide), tmp_path / "run"
  report = upcycle.upcycle(dense, sparse, workdir, 0.0, 0.3, "carry")
  assert report["why_not"] == ["hidden units drawn anew"]
  old, new = flat(dense), flat(workdir)
  before, after = (restored(each)[1] for each in (dense, workdir))
  assert int(after.step) == 2 == int(before.step)
  before, after = moments(before.opt_state), moments(after.opt_state)
  assert all(after[key] == 2 for key in after if key[0] == "count")
  sets = []
  for expert in range(8):
    units = []
    for part, axis in (("w_in", 1), ("w_gate", 1), ("w_out", 0)):
      key = f"layers_1/experts/{part}"
      own, copy = old[key][0], new[key][expert]
      changed = (own != copy).any(1 - axis)
      # 0.3 of 64, the same in every matrix.
      assert changed.sum() == 19 and (own != copy).all(1 - axis).sum() == 19
      units.append(tuple(np.flatnonzero(changed)))
      drawn, replaced = (a.take(units[-1], axis) for a in (copy, own))
      assert abs(drawn.mean() - replaced.mean()) < 0.2
      assert drawn.std() == pytest.approx(replaced.std(), rel=0.2)
      for moment in ("mu", "nu"):
        carried = after[moment, key][expert]
        wanted = np.where(
          np.expand_dims(changed, 1 - axis), 0, before[moment, key][0]
        )
        np.testing.assert_array_equal(carried, wanted)
    assert len(set(units)) == 1
    sets.append(units[0])
  assert len(set(sets)) == 8
  for key, moment in after.items():
    if "router" in key[1]:
      assert not moment.any()
    elif "experts" not in key[1]:
      np.testing.assert_array_equal(moment, before[key])


def test_noise_and_reset(trained, config, tmp_path):
  sparse = random_runs.experiment_of(config(*lstm(16, kind="top_k", k=2)))
  source, workdir = trained(*ONE), tmp_path / "run"
  report = upcycle.upcycle(source, sparse, workdir, 0.1)
  assert report["why_not"] == ["noise"] and not report["function_kept"]
  old, new = flat(source), flat(workdir)
  for name in ("w_in", "w_out"):
    key = f"layers_1/experts/{name}"
    off = new[key] - old[key]
    assert off.std() / old[key].std() == pytest.approx(0.1, rel=0.1)
    assert len({expert.tobytes() for expert in off}) == 8
  assert not any(
    m.any() for m in moments(restored(workdir)[1].opt_state).values()
  )


def test_gates_that_do_not_sum_to_1_are_told(trained, config, tmp_path):
  sparse = random_runs.experiment_of(config(*lstm(16, kind="switch")))
  report = upcycle.upcycle(trained(*ONE), sparse, tmp_path / "run")
  (why,) = report["why_not"]
  assert re.search(r"layers_1: the gates of a token sum to 0\.\d+", why)
  sparse = random_runs.experiment_of(config(*lstm(4, kind="top_k", k=2)))
  report = upcycle.upcycle(trained(*ONE), sparse, tmp_path / "parts")
  (why,) = report["why_not"]
  assert "visits 2 experts, no multiple of the 4 parts" in why


def test_the_new_run_trains_on_and_is_read(trained, config, tmp_path, capsys):
  workdir = tmp_path / "run"
  flags = config(*blocks(8, TOP_2, **{"data.row_length": 16}))
  where = [f"--workdir={workdir}"]
  source = f"--from={trained(*DENSE)}"
  assert main(["moejax", "upcycle", source, *flags, *where]) == 0
  said = capsys.readouterr().out
  assert "the function is the same" in said and "at step 0" in said
  before = flat(workdir)
  assert main(["moejax", "eval", *where]) == 0
  assert "(checkpoint of step 0)" in capsys.readouterr().out
  assert main(["moejax", "train", *flags, *where]) == 0
  after = flat(workdir)
  for name in (n for n in before if "experts" in n and len(before[n]) > 1):
    # Gradient reaches copies, and makes them differ.
    moved = np.abs(after[name] - before[name]).sum((1, 2)) > 0
    assert moved.sum() >= 2
    assert (
      len(
        {
          (a - b).tobytes()
          for a, b in zip(after[name], before[name], strict=True)
        }
      )
      > 2
    )
  # What is made of it once more is not put over it.
  assert main(["moejax", "upcycle", source, *flags, *where]) == 1
  assert "is there already" in capsys.readouterr().err


ERRORS = {
  "sizes": (
    ONE,
    lstm(5, kind="top_k", k=2),
    "16 hidden units.* 8 experts of 5.*nearest hidden that fits is 4",
  ),
  "number of parts": (
    ONE,
    lstm(1, kind="top_k", k=2),
    "nearest hidden that fits is 2",
  ),
  "width": (
    ONE,
    ("sotu/moe_32", MIXED | {"model.width": 4, "model.moe.experts.hidden": 16}),
    r"is \(\d+, 8\) in the run, \(\d+, 4\) in the config",
  ),
  "gated": (
    ONE,
    ("sotu/moe_32", MIXED | {"model.moe.experts.gated": True}),
    "w_gate, w_in, w_out in the config, w_in, w_out in the run",
  ),
  "layers": (
    DENSE,
    blocks(16, TOP_2, **SCAN, **{"model.blocks.num_layers": 6}),
    "run has none; it has 4 feed-forward layers, the config 6",
  ),
  "fewer layers": (
    DENSE,
    blocks(16, TOP_2, **{"model.blocks.num_layers": 2}),
    "where the config has none",
  ),
  "dense": (ONE, ONE, "no mixture where the run has a dense layer"),
  "sparse": (
    SPLIT["top_k"],
    ("sotu/moe_32", MIXED | {"model.moe.num_experts": 4}),
    "8 experts in the run, 4 in the config",
  ),
  "tokens": (ONE, ("translate_tiny", {}), "reads 'text', the config 'pairs'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_does_not_fit_is_refused(name, trained, config, tmp_path):
  source, (new, fields), message = ERRORS[name]
  flags = (
    config(new, fields) if new != "translate_tiny" else [f"--config={new}"]
  )
  workdir = tmp_path / "run"
  with pytest.raises(ValueError, match=message):
    upcycle.upcycle(trained(*source), random_runs.experiment_of(flags), workdir)
  assert not workdir.exists()


@pytest.mark.parametrize(
  "verb, args, message",
  [
    (upcycle.split, (3,), "hidden 8 cannot be cut in 3 parts"),
    (upcycle.merge, (8,), "of 8 experts, 2 a token, 8 cannot be left"),
    (upcycle.prune, (1,), "give from 2 to 7"),
    (upcycle.prune, (4, "size"), "choose one of 'load', 'reap'"),
  ],
)
def test_what_cannot_be_made_is_refused(verb, args, message, trained, tmp_path):
  with pytest.raises(ValueError, match=message):
    verb(trained(*SPLIT["top_k"]), tmp_path / "run", *args)
  assert not (tmp_path / "run").exists()


def test_a_pruned_run_is_trained_already(trained, tmp_path):
  """No annealing comes again; no token visits more experts than there are."""
  name, fields = lstm(8, kind="expert_threshold", k=2, max_k=8)
  fields |= {
    "train.annealing": {"k": (8,), "until": (1,)},
    "aux": {"quantile": 0.1},
  }
  upcycle.prune(trained(name, fields), tmp_path / "run", 3)
  values = run.recall(tmp_path / "run").values
  assert values["train"].get("annealing") is None
  assert values["model"]["moe"]["router"]["max_k"] == 3


def test_runs_without_what_is_needed(trained, config, tmp_path):
  workdir, sparse = tmp_path / "run", lstm(16, kind="switch")
  with pytest.raises(ValueError, match="has no mixtures"):
    upcycle.split(trained(*ONE), workdir, 2)
  with pytest.raises(ValueError, match="'switch' cannot send a token"):
    upcycle.split(trained(*sparse), workdir, 2)
  in_groups = lstm(16, kind="sigmoid", k=2, num_groups=2)
  with pytest.raises(ValueError, match="'sigmoid' scores a group"):
    upcycle.split(trained(*in_groups), workdir, 2)
  experiment = random_runs.experiment_of(config(*sparse))
  with pytest.raises(FileNotFoundError, match="no run was made there"):
    upcycle.upcycle(tmp_path / "none", experiment, workdir)
  for options in ((-1.0,), (0.0, 1.5), (0.0, 0.0, "keep")):
    with pytest.raises(ValueError):
      upcycle.upcycle(trained(*ONE), experiment, workdir, *options)
  factored = random_runs.experiment_of(
    [*config(*sparse), "--config.optimizer.kind=factored_adam"]
  )
  with pytest.raises(ValueError, match="--optimizer=reset"):
    upcycle.upcycle(trained(*ONE), factored, workdir, 0.0, 0.0, "carry")
