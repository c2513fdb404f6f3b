"""Checkpoints come back whole, on any mesh, or are passed over."""

import contextlib
import hashlib
import os
import pathlib
import random
import re
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.training import checkpoint, state
from moejax.training.checkpoint import Checkpoints


def on(devices):
  mesh = Mesh(np.array(jax.devices()[:devices]), ("x",))
  return NamedSharding(mesh, PartitionSpec("x"))


def make(step, devices=8):
  def put(array):
    return jax.device_put(array, on(devices))

  return state.TrainState(
    jnp.int32(step),
    {"w": put(jnp.arange(16.0) * step)},
    ({"m": put(jnp.arange(8.0) - step)},),
  )


def target(devices=8):
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=leaf.sharding
    ),
    make(0, devices),
  )


def fill(directory, steps, keep=2):
  """Saves steps of (step, perplexity)."""
  checkpoints = Checkpoints(directory, keep)
  for step, perplexity in steps:
    checkpoints.save(make(step), step, {"data": {"at": step}}, perplexity)
  checkpoints.close()
  return Checkpoints(directory, keep)


def assert_is(restored, step):
  assert restored.progress == {"data": {"at": step}}
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, b), restored.state, make(step)
  )


def cut(directory, step):
  """Cuts the largest file of a checkpoint in half."""
  files = [f for f in (directory / str(step)).rglob("*") if f.is_file()]
  largest = max(files, key=lambda file: file.stat().st_size)
  largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def test_nothing_saved_is_nothing_restored(tmp_path):
  assert Checkpoints(tmp_path).latest(target()) is None
  assert Checkpoints(tmp_path).best(target()) is None


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_latest_comes_back_on_any_mesh(tmp_path, devices):
  restored = fill(tmp_path, [(1, None), (2, None)]).latest(target(devices))
  assert_is(restored, 2)
  assert restored.state.params["w"].sharding == on(devices)


def test_keeps_the_last_and_the_best(tmp_path):
  steps = [(1, 9.0), (2, 3.0), (3, 5.0), (4, None), (5, 7.0), (6, None)]
  checkpoints = fill(tmp_path, steps)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "5", "6"]
  assert_is(checkpoints.best(target()), 2)
  assert_is(checkpoints.latest(target()), 6)


def test_best_is_the_newest_where_none_was_validated(tmp_path):
  assert_is(fill(tmp_path, [(1, None), (2, None)]).best(target()), 2)


def test_one_cut_short_falls_back_and_says_so(tmp_path, capfd):
  checkpoints = fill(tmp_path, [(1, None), (2, None)])
  cut(tmp_path, 2)
  assert_is(checkpoints.latest(target()), 1)
  assert "checkpoint of step 2 cannot be read" in capfd.readouterr().err
  # The step can be saved again.
  checkpoints.save(make(2), 2, {"data": {"at": 2}})
  checkpoints.wait()
  assert_is(checkpoints.latest(target()), 2)


def test_a_damaged_best_gives_the_next_best(tmp_path, capfd):
  steps = [(1, 1.0), (2, 2.0), (3, 9.0), (4, None)]
  checkpoints = fill(tmp_path, steps, keep=4)
  cut(tmp_path, 1)
  restored = checkpoints.best(target())
  assert_is(restored, 2)
  assert restored.perplexity == 2.0
  assert "checkpoint of step 1 cannot be read" in capfd.readouterr().err


def test_all_damaged_is_an_error(tmp_path):
  checkpoints = fill(tmp_path, [(1, None), (2, None)])
  cut(tmp_path, 1)
  cut(tmp_path, 2)
  with pytest.raises(ValueError, match=r"none of the 2 checkpoints .*\[1, 2\]"):
    checkpoints.latest(target())
  assert (tmp_path / "2").exists()  # nothing is deleted where nothing is left


def test_what_a_crash_left_half_written_is_no_checkpoint(tmp_path):
  fill(tmp_path, [(1, None)]).close()
  (tmp_path / "2.orbax-checkpoint-tmp-1").mkdir()
  assert_is(Checkpoints(tmp_path).latest(target()), 1)


def test_what_is_damaged_is_set_aside_not_deleted(tmp_path):
  checkpoints = fill(tmp_path, [(1, None), (2, None)])
  cut(tmp_path, 2)
  checkpoints.latest(target())
  (aside,) = tmp_path.glob("damaged-2-*")
  assert (aside / "state").is_dir()


@pytest.mark.parametrize(
  "content", [b"", b'{"perpl', b'{"perplexity": 1.0, "step": 2}']
)
def test_a_damaged_perplexity_is_left_out(tmp_path, content, capfd):
  fill(tmp_path, [(1, 3.0), (2, 2.0)]).close()
  (tmp_path / "2" / "metrics" / "metrics").write_bytes(content)
  assert_is(Checkpoints(tmp_path).latest(target()), 1)
  assert "checkpoint of step 2 cannot be read" in capfd.readouterr().err


@pytest.mark.parametrize("read_only", [True, False])
def test_a_perplexity_counts_only_as_it_was_written(tmp_path, read_only):
  fill(tmp_path, [(1, 3.0), (2, 5.0), (3, None)], keep=3).close()
  score = tmp_path / "2" / "metrics" / "metrics"
  # One bit makes 1.0 of 5.0, and JSON of it all the same.
  score.write_bytes(score.read_bytes().replace(b"5.0", b"1.0"))
  checkpoints = Checkpoints(tmp_path, 1, read_only)
  assert_is(checkpoints.best(target()), 1)
  if not read_only:
    checkpoints.save(make(4), 4, {"data": {"at": 4}}, 4.0)
    checkpoints.wait()
    assert_is(checkpoints.best(target()), 1)
  checkpoints.close()


def test_a_best_of_damaged_perplexity_is_not_deleted(tmp_path):
  fill(tmp_path, [(1, 3.0), (2, 5.0)]).close()
  score = tmp_path / "1" / "metrics" / "metrics"
  score.write_bytes(score.read_bytes().replace(b"3.0", b"7.0"))
  checkpoints = Checkpoints(tmp_path, keep=1)
  for step in (3, 4):
    checkpoints.save(make(step), step, {"data": {"at": step}}, 6.0)
  checkpoints.close()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "4"]
  Checkpoints(tmp_path).latest(target())
  assert list(tmp_path.glob("damaged-1-*"))


def test_a_perplexity_of_an_older_version_counts(tmp_path):
  fill(tmp_path, [(1, 3.0), (2, 5.0)]).close()
  score, sums = (tmp_path / "1" / n for n in ("metrics/metrics", "SHA256SUMS"))
  before = hashlib.sha256(score.read_bytes()).hexdigest()
  score.write_bytes(b'{"perplexity": 3.0}')
  after = hashlib.sha256(score.read_bytes()).hexdigest()
  sums.write_text(sums.read_text().replace(before, after))
  assert_is(Checkpoints(tmp_path).best(target()), 1)


@pytest.mark.parametrize("part", ["", "state", "progress", "metrics"])
def test_what_has_changed_places_is_not_taken(tmp_path, part):
  fill(tmp_path, [(1, 3.0), (2, 2.0), (3, 1.0)], keep=3).close()
  two, three, spare = (tmp_path / n / part for n in ("2", "3", "spare"))
  spare.parent.mkdir(exist_ok=True)
  two.rename(spare)
  three.rename(two)
  spare.rename(three)
  assert_is(Checkpoints(tmp_path, read_only=True).best(target()), 1)
  assert_is(Checkpoints(tmp_path).latest(target()), 1)


def test_what_training_deletes_meanwhile_is_looked_for_again(tmp_path):
  writing = fill(tmp_path, [(1, 3.0), (2, 5.0)], keep=1)
  reading = Checkpoints(tmp_path, read_only=True)
  writing.save(make(3), 3, {"data": {"at": 3}}, 2.0)
  writing.close()
  assert not (tmp_path / "1").exists()
  assert_is(reading.best(target()), 3)
  reading.close()


def halve(content, chance):
  del chance
  return content[: len(content) // 2]


def flip_a_bit(content, chance):
  content = bytearray(content)
  if content:
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
  return bytes(content)


@pytest.mark.parametrize("damage, times", [(halve, 1), (flip_a_bit, 3)])
def test_every_damaged_file_is_right_or_passed_over(tmp_path, damage, times):
  fill(tmp_path, [(1, 3.0), (2, 2.0)]).close()
  chance = random.Random(0)
  files = sorted(f for f in (tmp_path / "2").rglob("*") if f.is_file())
  assert len(files) > 5
  passed_over = 0
  for number, file in enumerate(files * times):
    copy = tmp_path / f"copy{number}"
    for step in ("1", "2"):
      shutil.copytree(tmp_path / step, copy / step)
    damaged = copy / file.relative_to(tmp_path)
    damaged.write_bytes(damage(damaged.read_bytes(), chance))
    restored = Checkpoints(copy).latest(target())
    assert_is(restored, int(restored.state.step))
    passed_over += int(restored.state.step) == 1
  assert passed_over > len(files) * times // 2


def test_the_digests_are_those_that_everybody_can_check(tmp_path):
  fill(tmp_path, [(1, 3.0)]).close()
  folder = tmp_path / "1"
  for line in (folder / checkpoint.SUMS_FILE).read_text().splitlines():
    digest, name = line.split("  ")
    content = (folder / name).read_bytes()
    assert hashlib.sha256(content).hexdigest() == digest


def cut_lines(lines):
  yield from (lines[:count] for count in range(len(lines)))


def leave_out_lines(lines):
  yield from (lines[:at] + lines[at + 1 :] for at in range(len(lines)))


def add_lines(lines):
  nothing = "0" * 64
  yield lines + lines[:1]
  yield [f"{nothing}{lines[0][64:]}", *lines]
  yield [*lines, f"{nothing}  ../1/progress/metadata\n"]
  yield [*lines, f"{nothing}  /etc/hostname\n"]
  yield [*lines, "\n"]


@pytest.mark.parametrize("damage", [cut_lines, leave_out_lines, add_lines])
def test_the_digests_are_of_all_files(tmp_path, damage, capfd):
  fill(tmp_path, [(1, 3.0), (2, 2.0)]).close()
  sums = tmp_path / "2" / checkpoint.SUMS_FILE
  for lines in damage(sums.read_text().splitlines(keepends=True)):
    sums.write_text("".join(lines))
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert checkpoints.newest() == 2
    assert_is(checkpoints.best(target()), 1)
    assert "checkpoint of step 2 cannot be read" in capfd.readouterr().err


@pytest.mark.parametrize(
  "name, sound", [("state/x", False), ("metrics/x", False), (".nfs01", True)]
)
def test_a_file_that_nobody_wrote_is_damage(tmp_path, name, sound):
  fill(tmp_path, [(1, 3.0), (2, 2.0)]).close()
  (tmp_path / "2" / name).write_text("x")
  assert_is(Checkpoints(tmp_path).latest(target()), 2 if sound else 1)


@pytest.mark.parametrize("find", ["latest", "best"])
@pytest.mark.parametrize("where", ["scandir", "open"])
def test_what_cannot_be_read_is_not_damage(tmp_path, monkeypatch, find, where):
  checkpoints = fill(tmp_path, [(1, 3.0), (2, 2.0)])

  def fail(*_):
    raise PermissionError(13, "Permission denied", str(tmp_path / "2" / "x"))

  with monkeypatch.context() as patched:
    if where == "open":
      patched.setattr(hashlib, "file_digest", fail)
    else:
      patched.setattr(os, "scandir", fail)
    with pytest.raises(OSError, match="2/x .Permission denied.*make it read"):
      getattr(checkpoints, find)(target())
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]
  assert_is(checkpoints.latest(target()), 2)


def test_a_folder_that_cannot_be_entered_is_not_empty(tmp_path, monkeypatch):
  stat = os.stat

  def no_search(path, *rest, **more):
    if str(path).startswith(f"{tmp_path}/"):
      raise PermissionError(13, "Permission denied", str(path))
    return stat(path, *rest, **more)

  monkeypatch.setattr(os, "stat", no_search)
  with pytest.raises(OSError, match="Permission denied"):
    Checkpoints(tmp_path, read_only=True)


ODD = [
  "[1]",
  "[",
  "a*b?",
  "**",
  "a\\b",
  "\\",
  "logs:",
  "x.__lock",
  "a\nb",
  "\udc80",
]


@pytest.mark.parametrize("name", ODD)
def test_any_path_will_do(tmp_path, name):
  folder = tmp_path / name / "checkpoints"
  checkpoints = fill(folder, [(1, 3.0), (2, None)])
  assert_is(checkpoints.latest(target()), 2)
  assert_is(checkpoints.best(target()), 1)
  checkpoints.close()
  assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]
  assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_a_path_through_a_link_and_back_will_do(tmp_path):
  (tmp_path / "deep" / "er").mkdir(parents=True)
  (tmp_path / "link").symlink_to("deep/er")
  folder = tmp_path / "link" / ".." / "checkpoints"
  assert_is(fill(folder, [(1, None)]).latest(target()), 1)
  assert (tmp_path / "deep" / "checkpoints" / "1" / "state" / "d").is_dir()


@pytest.mark.parametrize("name", ["[1]", "a\\b"])
def test_where_no_path_will_do_it_is_refused(tmp_path, monkeypatch, name):
  is_dir = pathlib.Path.is_dir
  monkeypatch.setattr(
    pathlib.Path,
    "is_dir",
    lambda path: not path.is_relative_to("/proc") and is_dir(path),
  )
  odd = re.escape(repr(set(name).difference("ab1").intersection("[\\").pop()))
  with pytest.raises(ValueError, match=f"path has {odd} in it"):
    Checkpoints(tmp_path / name)


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


def test_without_its_digests_a_checkpoint_is_not_trusted(tmp_path, capfd):
  checkpoints = fill(tmp_path, [(1, None), (2, None)])
  (tmp_path / "2" / checkpoint.SUMS_FILE).unlink()
  assert_is(checkpoints.latest(target()), 1)
  assert checkpoint.SUMS_FILE in capfd.readouterr().err


@contextlib.contextmanager
def files_of_at_most(size):
  """What the end of a disk does, at a place of our choice."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 100, 400])
def test_what_cannot_be_written_is_told(tmp_path, size):
  checkpoints = fill(tmp_path, [(1, None)])
  with (
    files_of_at_most(size),
    pytest.raises(OSError, match="step 2 could not be saved.*is of step 1"),
  ):
    checkpoints.save(make(2), 2, {"data": {"at": 2}})
    checkpoints.wait()
  checkpoints.close()
  assert_is(Checkpoints(tmp_path).latest(target()), 1)


def test_read_only_changes_nothing(tmp_path):
  fill(tmp_path, [(1, None), (2, None)]).close()
  cut(tmp_path, 2)
  half_written = tmp_path / "3.orbax-checkpoint-tmp-1"
  half_written.mkdir()
  before = sorted(tmp_path.iterdir())
  assert_is(Checkpoints(tmp_path, read_only=True).latest(target()), 1)
  assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("find", ["latest", "best"])
@pytest.mark.parametrize(
  "error",
  [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room")],
)
def test_no_room_is_no_damage(tmp_path, monkeypatch, find, error):
  checkpoints = fill(tmp_path, [(1, 3.0), (2, 2.0)])
  checkpoints.wait()

  def fail(*_):
    raise error

  with monkeypatch.context() as patched:
    patched.setattr(Checkpoints, "_restore", fail)
    with pytest.raises(type(error)):
      getattr(checkpoints, find)(target())
  assert_is(checkpoints.latest(target()), 2)
  checkpoints.close()
