"""Checkpoints come back whole, on any mesh, or are passed over."""

import contextlib
import hashlib
import random
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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


def test_a_damaged_best_gives_the_newest(tmp_path, capfd):
  checkpoints = fill(tmp_path, [(1, 1.0), (2, 2.0)])
  cut(tmp_path, 1)
  assert_is(checkpoints.best(target()), 2)
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


@pytest.mark.parametrize("content", [b"", b'{"perpl'])
def test_a_perplexity_cut_short_is_left_out(tmp_path, content, capfd):
  fill(tmp_path, [(1, 3.0), (2, 2.0)]).close()
  (tmp_path / "2" / "metrics" / "metrics").write_bytes(content)
  assert_is(Checkpoints(tmp_path).latest(target()), 1)
  assert "checkpoint of step 2 cannot be read" in capfd.readouterr().err


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
