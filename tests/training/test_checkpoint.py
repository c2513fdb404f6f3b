"""Checkpoints come back whole, on any mesh, or are passed over."""

import hashlib
import os
import pathlib
import shutil

import jax
import program
import pytest
from etils import epath
from states import assert_is, files_of_at_most, fill, make, on, save, target

from moejax.training import checkpoint
from moejax.training.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """Three checkpoints, of which the first is the best."""
  folder = tmp_path_factory.mktemp("saved")
  fill(folder, [(1, 2.0), (2, 5.0), (3, 7.0)], keep=3).close()
  return folder


@pytest.fixture
def three(saved, tmp_path):
  """A folder with a copy of them."""
  return shutil.copytree(saved, tmp_path / "three")


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def halve(file):
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def cut(directory, step):
  halve(program.largest_file(directory / str(step)))


def test_what_a_crash_left_half_written_is_no_checkpoint(tmp_path):
  assert Checkpoints(tmp_path).latest(target()) is None
  (tmp_path / "2.orbax-checkpoint-tmp-1").mkdir()
  assert Checkpoints(tmp_path).best(target()) is None


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_latest_comes_back_on_any_mesh(three, devices):
  restored = Checkpoints(three).latest(target(devices))
  assert_is(restored, 3)
  assert restored.state.params["w"].sharding == on(devices)


def test_keeps_the_last_and_the_best(tmp_path):
  steps = [(1, 9.0), (2, 3.0), (3, 5.0), (4, None), (5, 7.0), (6, None)]
  checkpoints = fill(tmp_path, steps)
  assert names(tmp_path) == ["2", "5", "6"]
  assert_is(checkpoints.best(target()), 2)
  assert_is(checkpoints.latest(target()), 6)


def test_best_is_the_newest_where_none_was_validated(tmp_path):
  assert_is(fill(tmp_path, [(1, None), (2, None)]).best(target()), 2)


def test_one_cut_short_is_set_aside_and_saved_again(three, capfd):
  checkpoints = Checkpoints(three)
  cut(three, 3)
  assert_is(checkpoints.latest(target()), 2)
  assert "checkpoint of step 3 cannot be read" in capfd.readouterr().err
  (aside,) = three.glob("damaged-3-*")
  assert (aside / "state").is_dir()
  save(checkpoints, 3)
  checkpoints.wait()
  assert_is(checkpoints.latest(target()), 3)


def test_a_damaged_best_gives_the_next_best(three, capfd):
  cut(three, 1)
  restored = Checkpoints(three).best(target())
  assert_is(restored, 2)
  assert restored.perplexity == 5.0
  assert "checkpoint of step 1 cannot be read" in capfd.readouterr().err


def test_all_damaged_is_an_error_that_deletes_nothing(three):
  for step in (1, 2, 3):
    cut(three, step)
  with pytest.raises(ValueError, match=r"none of the 3 checkp.*\[1, 2, 3\]"):
    Checkpoints(three).latest(target())
  assert names(three) == ["1", "2", "3"]


@pytest.mark.parametrize("read_only", [True, False])
def test_a_perplexity_counts_only_as_it_was_written(three, read_only):
  score = three / "2" / "metrics" / "metrics"
  # One bit makes 1.0 of 5.0, and JSON of it all the same.
  score.write_bytes(score.read_bytes().replace(b"5.0", b"1.0"))
  checkpoints = Checkpoints(three, 1, read_only)
  assert_is(checkpoints.best(target()), 1)
  if not read_only:
    save(checkpoints, 4, 4.0)
    checkpoints.wait()
    assert_is(checkpoints.best(target()), 1)
  checkpoints.close()


def test_a_best_of_damaged_perplexity_is_not_deleted(three):
  score = three / "1" / "metrics" / "metrics"
  score.write_bytes(score.read_bytes().replace(b"2.0", b"7.0"))
  checkpoints = Checkpoints(three, keep=1)
  save(checkpoints, 4, 6.0)
  save(checkpoints, 5, 6.0)
  checkpoints.close()
  assert names(three) == ["1", "2", "5"]
  Checkpoints(three).latest(target())
  assert list(three.glob("damaged-1-*"))


def test_a_perplexity_of_an_older_version_counts(three):
  score, sums = (three / "1" / n for n in ("metrics/metrics", "SHA256SUMS"))
  before = hashlib.sha256(score.read_bytes()).hexdigest()
  score.write_bytes(b'{"perplexity": 2.0}')
  after = hashlib.sha256(score.read_bytes()).hexdigest()
  sums.write_text(sums.read_text().replace(before, after))
  assert_is(Checkpoints(three).best(target()), 1)


@pytest.mark.parametrize("part", ["", "state", "progress", "metrics"])
def test_what_has_changed_places_is_not_taken(three, part):
  two, last, spare = (three / n / part for n in ("2", "3", "spare"))
  spare.parent.mkdir(exist_ok=True)
  two.rename(spare)
  last.rename(two)
  spare.rename(last)
  assert_is(Checkpoints(three, read_only=True).best(target()), 1)
  assert_is(Checkpoints(three).latest(target()), 1)


def test_what_training_deletes_meanwhile_is_looked_for_again(tmp_path):
  writing = fill(tmp_path, [(1, 3.0), (2, 5.0)], keep=1)
  reading = Checkpoints(tmp_path, read_only=True)
  save(writing, 3, 2.0)
  writing.close()
  assert names(tmp_path) == ["3"]
  assert_is(reading.best(target()), 3)
  reading.close()


@pytest.mark.parametrize("damage", [halve, program.damage])
def test_every_damaged_file_is_right_or_passed_over(saved, tmp_path, damage):
  files = sorted(f for f in (saved / "2").rglob("*") if f.is_file())
  assert len(files) > 5
  passed_over = 0
  for number, file in enumerate(files):
    copy = tmp_path / str(number)
    for step in ("1", "2"):
      shutil.copytree(saved / step, copy / step)
    damage(copy / file.relative_to(saved))
    restored = Checkpoints(copy).latest(target())
    assert_is(restored, int(restored.state.step))
    passed_over += int(restored.state.step) == 1
  # All but what Orbax writes for itself, and the end of the last line.
  assert passed_over >= len(files) - 3


def test_the_digests_are_of_all_files_as_sha256sum_has_them(three, capfd):
  sums = three / "1" / checkpoint.SUMS_FILE
  lines = sums.read_text().splitlines(keepends=True)
  for line in lines:
    digest, name = line.split()
    content = (three / "1" / name).read_bytes()
    assert hashlib.sha256(content).hexdigest() == digest
  nothing = "0" * 64
  damaged = [lines[:count] for count in (0, 1, -1)]
  damaged += [lines[:at] + lines[at + 1 :] for at in (0, len(lines) // 2)]
  damaged += [
    lines + lines[:1],
    [f"{nothing}{lines[0][64:]}", *lines],
    [*lines, f"{nothing}  ../2/progress/metadata\n"],
    [*lines, f"{nothing}  /etc/hostname\n"],
    [*lines, "\n"],
    None,
  ]
  for wrong in damaged:
    sums.unlink()
    if wrong is not None:
      sums.write_text("".join(wrong))
    checkpoints = Checkpoints(three, read_only=True)
    assert checkpoints.newest() == 3
    assert_is(checkpoints.best(target()), 2)
    said = capfd.readouterr().err
    assert "checkpoint of step 1 cannot be read" in said
    assert checkpoint.SUMS_FILE in said


@pytest.mark.parametrize(
  "name, sound", [("state/x", False), ("metrics/x", False), (".nfs01", True)]
)
def test_a_file_that_nobody_wrote_is_damage(three, name, sound):
  (three / "1" / name).write_text("x")
  assert_is(Checkpoints(three).best(target()), 1 if sound else 2)


@pytest.mark.parametrize(
  "find, call", [("latest", "scandir"), ("best", "file_digest")]
)
def test_what_cannot_be_read_is_not_damage(three, monkeypatch, find, call):
  checkpoints = Checkpoints(three)

  def fail(*_):
    raise PermissionError(13, "Permission denied", str(three / "3" / "x"))

  with monkeypatch.context() as patched:
    patched.setattr(os if call == "scandir" else hashlib, call, fail)
    with pytest.raises(OSError, match="3/x .Permission denied.*make it read"):
      getattr(checkpoints, find)(target())
  assert names(three) == ["1", "2", "3"]
  assert_is(checkpoints.latest(target()), 3)


def test_a_folder_that_cannot_be_entered_is_not_empty(tmp_path, monkeypatch):
  stat = os.stat

  def no_search(path, *rest, **more):
    if str(path).startswith(f"{tmp_path}/"):
      raise PermissionError(13, "Permission denied", str(path))
    return stat(path, *rest, **more)

  monkeypatch.setattr(os, "stat", no_search)
  with pytest.raises(OSError, match="Permission denied"):
    Checkpoints(tmp_path, read_only=True)


ODD = ["[", "a*b?", "a\\b", "logs:", "x.__lock", "a\nb", "\udc80"]


@pytest.mark.parametrize("name", ODD)
def test_any_path_will_do(tmp_path, name):
  folder = tmp_path / name / "checkpoints"
  checkpoints = fill(folder, [(1, None)])
  assert_is(checkpoints.latest(target()), 1)
  checkpoints.close()
  assert names(folder) == ["1"]
  assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_a_path_through_a_link_and_back_will_do(tmp_path):
  (tmp_path / "deep" / "er").mkdir(parents=True)
  (tmp_path / "link").symlink_to("deep/er")
  folder = tmp_path / "link" / ".." / "checkpoints"
  assert_is(fill(folder, [(1, None)]).latest(target()), 1)
  assert (tmp_path / "deep" / "checkpoints" / "1" / "state" / "d").is_dir()


def test_where_no_path_will_do_it_is_refused(tmp_path, monkeypatch):
  is_dir = pathlib.Path.is_dir
  monkeypatch.setattr(
    pathlib.Path,
    "is_dir",
    lambda path: not path.is_relative_to("/proc") and is_dir(path),
  )
  with pytest.raises(ValueError, match="where there is no /proc; give a --wo"):
    Checkpoints(tmp_path / "[1]")


def lose_a_part(folder):
  """What one of several processes wrote did not come."""
  (part,) = folder.glob("ocdbt.process_*")
  files = (part / "d").iterdir()
  max(files, key=lambda file: file.stat().st_size).unlink()


@pytest.mark.parametrize("lost", ["all", "a part"])
def test_what_cannot_be_restored_is_not_signed(tmp_path, monkeypatch, lost):
  checkpoints = fill(tmp_path, [(1, None)])
  if lost == "all":
    # Orbax looks in that way for what to bring together.
    monkeypatch.setattr(type(epath.Path()), "glob", lambda *_: iter(()))
  else:
    check = checkpoint._check_complete

    def lose_and_check(folder, shapes):
      lose_a_part(folder)
      check(folder, shapes)

    monkeypatch.setattr(checkpoint, "_check_complete", lose_and_check)
  state = make(2)
  # Small values lie in the index itself.
  state.params["w"] = jax.random.normal(jax.random.key(0), (10_000,))
  with pytest.raises(OSError, match="step 2 could not be saved.*is of step 1"):
    checkpoints.save(state, 2, {})
    checkpoints.wait()
  assert not list(tmp_path.glob(f"2*/{checkpoint.SUMS_FILE}"))
  checkpoints.close()


@pytest.mark.parametrize("size", [0, 400])
def test_what_cannot_be_written_is_told(three, size):
  checkpoints = Checkpoints(three)
  with (
    files_of_at_most(size),
    pytest.raises(OSError, match="step 4 could not be saved.*is of step 3"),
  ):
    save(checkpoints, 4)
    checkpoints.wait()
  checkpoints.close()
  assert_is(Checkpoints(three).latest(target()), 3)


def test_read_only_changes_nothing(three):
  cut(three, 3)
  (three / "4.orbax-checkpoint-tmp-1").mkdir()
  before = names(three)
  assert_is(Checkpoints(three, read_only=True).latest(target()), 2)
  assert names(three) == before


@pytest.mark.parametrize(
  "find, error",
  [
    ("latest", MemoryError()),
    ("best", jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room")),
  ],
)
def test_no_room_is_no_damage(three, monkeypatch, find, error):
  checkpoints = Checkpoints(three)

  def fail(*_):
    raise error

  with monkeypatch.context() as patched:
    patched.setattr(Checkpoints, "_restore", fail)
    with pytest.raises(type(error)):
      getattr(checkpoints, find)(target())
  assert_is(checkpoints.latest(target()), 3)
  checkpoints.close()
