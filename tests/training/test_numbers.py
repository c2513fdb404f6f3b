"""Every number that a run prints or logs is what it is called."""

import json
import math
import re
import time

import jax
import numpy as np
import program
import pytest

from moejax.main import main
from moejax.training import checkpoint, evaluators, metrics, run, session

STEPS, LOG, EVAL, SAVE = 7, 2, 3, 100
PEAK, WARMUP, HOLD = 0.005, 2, 2
FLAGS = {
  "train.steps": STEPS,
  "train.log_every": LOG,
  "train.eval_every": EVAL,
  "train.checkpoint_every": SAVE,
  "train.keep": 1,
  "optimizer.peak": PEAK,
  "optimizer.warmup_steps": WARMUP,
  "optimizer.hold_steps": HOLD,
}
WORSE = 10.0
# Of each step, as the run itself did it.
TOOK = []


@pytest.fixture(scope="module", autouse=True)
def two_devices():
  """As many as "a device" needs to be told from all of them."""
  with program.first_devices(2):
    yield


@pytest.fixture(scope="module")
def told(small_flags, tmp_path_factory):
  """A run whose first validation is the best, what it printed, how long."""
  workdir = tmp_path_factory.mktemp("told") / "run"
  measured, lines = [], []

  def worse(*args):
    values = evaluators.perplexity(*args)
    measured.append(values["perplexity"])
    return values | {
      "perplexity": values["perplexity"] * WORSE ** len(measured)
    }

  argv = ["moejax", "train", *small_flags, f"--workdir={workdir}"]
  argv += [f"--config.{name}={value}" for name, value in FLAGS.items()]
  begin = time.monotonic()

  def slow(built):
    step_fn = compiled(built)

    def run(*args):
      """Ends when it returns, as a device that waits for the host."""
      begin = time.monotonic()
      result = jax.block_until_ready(step_fn(*args))
      time.sleep(0.1)
      TOOK.append(time.monotonic() - begin)
      return result

    return run

  compiled = session.compiled
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(session, "compiled", slow)
    patch.setitem(evaluators.AT_VALIDATION, "perplexity", worse)
    patch.setattr("moejax.terminal.say", lines.append)
    assert main(argv) == 0
  return workdir, lines, time.monotonic() - begin


def of_split(workdir, split):
  found = metrics.read(workdir / metrics.METRICS_FILE)
  return {line["step"]: line for line in found if line["split"] == split}


def test_what_is_done_when(told):
  workdir, _, _ = told
  assert list(of_split(workdir, "train")) == [2, 4, 6]
  assert list(of_split(workdir, "validation")) == [3, 6, 7]
  assert list(of_split(workdir, "test")) == [STEPS]
  # The last one and the best.
  kept = {path.name for path in (workdir / run.CHECKPOINTS).iterdir()}
  assert {name for name in kept if name.isdigit()} == {"3", "7"}


def test_the_metrics_of_training(told):
  workdir, lines, elapsed = told
  seconds = 0.0
  for at, line in of_split(workdir, "train").items():
    rate = PEAK * min(at / WARMUP, 1, math.sqrt((WARMUP + HOLD) / at))
    assert line["learning_rate"] == pytest.approx(rate, rel=1e-6)
    assert line["sampled_perplexity"] == math.exp(line["sampled_loss"])
    said = (
      f"step {at}/{STEPS}  sampled loss {line['sampled_loss']:.3f}"
      f"  {line['words_per_second']:,.0f} words/s"
      f"  {line['tflops_per_device']:.3g} TFLOPS a device"
    )
    assert sum(text.startswith(said) for text in lines) == 1
    # The steps since the line or the validation before, but for the first one.
    steps = {2: 1, 4: 0, 6: 2}[at]
    assert (line["words_per_second"] == 0) == (steps == 0)
    # A batch has 128 places for words, of which few are empty.
    seconds += steps and 100 * steps / line["words_per_second"]
    took = sum(TOOK[at - steps : at])
    assert line["words_per_second"] * took <= 128 * steps
  assert 0 < seconds < elapsed


def test_tflops_are_those_of_the_models_formula(told):
  """Two LSTMs of 8 units, a router of 8 experts, 2 of 8 x 8 x 8, a softmax."""
  workdir, _, _ = told
  vocab_size = len(run.open_run(workdir).data.vocabulary)
  p = np.log1p(1 / np.arange(1, vocab_size + 1)) / np.log(vocab_size + 1)
  classes = round((1 - (1 - p) ** 16).sum()) + 1
  ops = 2 * 4 * (8 + 8) * 8 + 2 * 8 * 8 + 2 * 2 * 8 * 8 + 8 * classes
  found = []
  for line in of_split(workdir, "train").values():
    flops = 2 * 3 * ops * line["words_per_second"] / len(jax.devices())
    assert line["tflops_per_device"] == pytest.approx(flops / 1e12)
    found += [line["tflops_per_device"]] if flops else []
  result = json.loads((workdir / "result.json").read_text())
  assert result["tflops_per_device"] == pytest.approx(np.median(found))


def test_the_sizes(told):
  workdir, lines, _ = told
  context = run.open_run(workdir)
  params = run.best(workdir, context.session).params
  size = sum(leaf.size for leaf in jax.tree.leaves(params))
  outer = sum(params[name]["table"].size for name in ("embed", "head"))
  said = f"{size:,} parameters, {size - outer:,} of them outside embedding"
  assert any(text.startswith(said) for text in lines)
  words = ", ".join(
    rf"{split} {context.rows(split).num_words:,}( \(.*?\))?"
    for split in ("train", "validation", "test")
  )
  found = f"vocabulary of {len(context.data.vocabulary):,}; words: {words}"
  assert any(re.fullmatch(found, text) for text in lines)


def test_the_test_is_that_of_the_best_checkpoint(told):
  workdir, lines, elapsed = told
  result = json.loads((workdir / "result.json").read_text())
  assert (result["best_step"], result["steps"]) == (3, STEPS)
  built = run.open_run(workdir)
  folder = checkpoint.Checkpoints(workdir / run.CHECKPOINTS, read_only=True)
  best = folder.best(built.session.abstract_state).state
  last = folder.latest(built.session.abstract_state).state
  folder.close()
  assert (int(best.step), int(last.step)) == (3, STEPS)
  rows = built.rows("test")
  want = evaluators.perplexity(built, best.params, "test", print)
  assert result["test"] == pytest.approx(want, rel=1e-6)
  assert built.losses(last.params, rows)["loss"] != pytest.approx(want["loss"])
  (logged,) = of_split(workdir, "test").values()
  assert logged == result["test"] | {"step": STEPS, "split": "test"}
  assert want["words"] == rows.num_words
  assert want["perplexity"] == math.exp(want["loss"])
  # Of words, the two are one; bits are over the lines as they were read.
  assert want["word_perplexity"] == want["perplexity"]
  lines_read = built.data.pairs["test"][0].targets
  bits = want["loss"] * rows.num_words / math.log(2)
  bits /= sum(len(line.encode()) for line in lines_read)
  assert want["bits_per_byte"] == pytest.approx(bits)
  assert 0 < result["seconds"] < elapsed
  assert lines[-1] == (
    f"test perplexity {want['perplexity']:,.2f} per word"
    f" ({rows.num_words:,} words), {bits:.3f} bits per byte, by the best"
    f" checkpoint (step 3 of {STEPS});"
    f" trained in {metrics.clock(result['seconds'])}; the run lies in {workdir}"
  )


def test_the_validations(told):
  workdir, lines, _ = told
  for i, (at, line) in enumerate(of_split(workdir, "validation").items()):
    worse = math.exp(line["loss"]) * WORSE ** (i + 1)
    assert line["perplexity"] == pytest.approx(worse)
    said = f"step {at}: validation perplexity {line['perplexity']:,.2f} per"
    assert sum(text.startswith(said) for text in lines) == 1
