"""What a run keeps, what of its config may change, and what may not."""

import copy
import json

import pytest

from moejax import config_fields, workdir
from moejax.data.pieces import Pieces
from moejax.data.vocab import Vocabulary

CONFIG = {
  "layout": "expert",
  "data": {"train": "a.txt", "data_dir": "", "batch_size": 8},
  "optimizer": {"peak": 0.1},
  "train": {"steps": 10, "microbatches": 1, "keep": 2},
}
TEXT = {"train": "0123", "test": "4567"}


@pytest.fixture
def made(tmp_path):
  own = Vocabulary.build(["a b a"], 1)
  workdir.remember(CONFIG, own, TEXT, tmp_path)
  return tmp_path


def changed(field, value):
  values = copy.deepcopy(CONFIG)
  config_fields.set_field(values, f"config.{field}", value)
  return values


@pytest.mark.parametrize("kind", [Vocabulary, Pieces])
def test_a_lost_vocabulary_is_told_from_a_broken_one(kind, tmp_path):
  with pytest.raises(FileNotFoundError, match=rf"{kind.FILE} is gone"):
    workdir.vocabulary(kind, tmp_path)
  (tmp_path / kind.FILE).write_text("a\n")
  with pytest.raises(ValueError, match=kind.FILE):
    workdir.vocabulary(kind, tmp_path)


def test_the_runs_own_vocabulary_and_no_other(made):
  own = workdir.vocabulary(Vocabulary, made)
  assert own.digest == Vocabulary.build(["a b a"], 1).digest
  Vocabulary.build(["a b a c"], 1).save(made / Vocabulary.FILE)
  with pytest.raises(ValueError, match=f"not the one.*{own.digest}; put"):
    workdir.vocabulary(Vocabulary, made)


@pytest.mark.parametrize(
  "field, value",
  [
    ("layout", "fsdp"),
    ("layout", {"mesh_shape": (1, -1, 1)}),
    ("train.steps", 20),
    ("train.keep", 3),
    ("data.train", "b.txt"),
    ("data.data_dir", "elsewhere"),
  ],
)
def test_what_cannot_change_the_numbers_may_change(made, field, value):
  config = changed(field, value)
  workdir.check_same(config, made)
  assert workdir.other_text(config, made) == field.startswith("data")
  (made / workdir.RESULT_FILE).write_text("{}")
  workdir.remember(config, Vocabulary.build(["c"], 1), {}, made)
  # The new value is remembered, and the old end is none.
  assert workdir.recall(made) == json.loads(json.dumps(config))
  assert not (made / workdir.RESULT_FILE).exists()
  assert len(workdir.vocabulary(Vocabulary, made)) == 5


@pytest.mark.parametrize(
  "field", ["data.batch_size", "optimizer.peak", "train.microbatches"]
)
def test_what_changes_the_numbers_may_not(made, field):
  with pytest.raises(ValueError, match=f"config.{field}: .* there, 7"):
    workdir.check_same(changed(field, 7), made)


def test_the_text_is_known_by_its_digest(made):
  workdir.check_text(TEXT, made)
  workdir.check_text({"test": TEXT["test"]}, made)
  with pytest.raises(ValueError, match="the text of test has changed"):
    workdir.check_text(TEXT | {"test": "0000"}, made)
  # A run of an older version noted none, so it must lie where it lay.
  (made / workdir.TEXT_FILE).unlink()
  with pytest.raises(ValueError, match="config.data.train: 'a.txt' there"):
    workdir.check_same(changed("data.train", "b.txt"), made)


@pytest.mark.parametrize("content", ["", "[]"])
def test_a_damaged_config_is_told_with_the_way_out(made, content):
  (made / workdir.CONFIG_FILE).write_text(content)
  with pytest.raises(ValueError, match=r"config.json .*put the file back"):
    workdir.check_same(CONFIG, made)


@pytest.mark.parametrize(
  "left", ["checkpoints", "metrics.jsonl", "result.json"]
)
def test_a_run_that_lost_its_config_is_no_new_one(tmp_path, left):
  """It would go on under any other config, and call that its own."""
  assert not workdir.is_run(tmp_path)
  (tmp_path / left).touch()
  with pytest.raises(FileNotFoundError, match=f"json is gone, though {left}"):
    workdir.is_run(tmp_path)
