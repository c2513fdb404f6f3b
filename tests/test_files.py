"""Files of folders that anybody made: what is opened, written and locked."""

import errno
import fcntl
import os
import pathlib
import stat
import subprocess
import sys

import pytest

from moejax import files


def odd(folder, kind):
  """Makes something odd, and the file that a link would lead to."""
  path, target = folder / "odd", folder / "precious"
  target.write_text("precious")
  if kind == "link":
    path.symlink_to(target)
  elif kind == "dangling":
    path.symlink_to(folder / "nowhere")
  elif kind == "pipe":
    os.mkfifo(path)
  elif kind == "folder":
    path.mkdir()
  elif kind == "device":
    try:
      os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))
    except PermissionError:
      pytest.skip("only root makes devices")
  return path, target


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
@pytest.mark.parametrize("mode", ["rb", "ab", "r+b", "a+b", "xb"])
def test_only_regular_files_are_opened(kind, mode, tmp_path):
  path, _ = odd(tmp_path, kind)
  with pytest.raises(OSError, match=f"{path} is a {kind} where a regular"):
    files.open_regular(path, mode)


@pytest.mark.parametrize("kind", ["link", "dangling"])
@pytest.mark.parametrize("mode", ["ab", "r+b", "a+b", "xb"])
def test_nothing_is_opened_for_writing_through_a_link(kind, mode, tmp_path):
  path, target = odd(tmp_path, kind)
  with pytest.raises(OSError, match=f"{path} is a link where a regular"):
    files.open_regular(path, mode)
  assert target.read_text() == "precious"
  assert not (tmp_path / "nowhere").exists()


def test_a_link_to_a_file_is_read(tmp_path):
  path, _ = odd(tmp_path, "link")
  assert files.read(path) == b"precious"


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "device"])
def test_what_is_written_whole_replaces_what_was_there(kind, tmp_path):
  path, target = odd(tmp_path, kind)
  files.write_whole(path, "new")
  assert not path.is_symlink() and path.read_text() == "new"
  assert target.read_text() == "precious"
  assert len(list(tmp_path.iterdir())) == 2


def test_a_failed_write_leaves_the_old_content_and_names_the_file(
  monkeypatch, tmp_path
):
  path = tmp_path / "file"
  files.write_whole(path, "old")

  def full(number):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with monkeypatch.context() as patch:
    patch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left.*{path}'"):
      files.write_whole(path, "new")
  assert path.read_text() == "old"
  assert list(tmp_path.iterdir()) == [path]


def test_content_is_on_the_disk_before_its_name_and_the_name_after(
  monkeypatch, tmp_path
):
  done = []
  fsync, replace = os.fsync, pathlib.Path.replace

  def seen_fsync(number):
    kind = "folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "file"
    done.append(kind)
    fsync(number)

  def seen_replace(self, target):
    done.append("rename")
    return replace(self, target)

  monkeypatch.setattr(os, "fsync", seen_fsync)
  monkeypatch.setattr(pathlib.Path, "replace", seen_replace)
  files.write_whole(tmp_path / "file", "new")
  assert done == ["file", "rename", "folder"]


def test_drafts_of_a_kill_are_removed_and_nothing_else(tmp_path):
  code = (
    "import os, pathlib, sys\nfrom moejax import files\n"
    "os.fsync = lambda number: os.kill(os.getpid(), 9)\n"
    "files.write_whole(pathlib.Path(sys.argv[1]), 'new')"
  )
  own = tmp_path / "paper.draft"
  own.touch()
  subprocess.run([sys.executable, "-c", code, tmp_path / "file"], check=False)
  assert len(list(tmp_path.iterdir())) == 2
  files.remove_drafts(tmp_path)
  assert list(tmp_path.iterdir()) == [own]


@pytest.mark.parametrize(
  "content, message",
  [
    (b"", "is empty"),
    (b" \n", "is empty"),
    (b'{"a": ', "is no JSON"),
    (b"[1]", "holds list, not an object"),
    (b"NaN", "holds float"),
    (b"\xff", "is no JSON"),
    (b"\0\0", "is no JSON"),
    (b"[" * 10**5, "is no JSON"),
    (b'{"a":' * 10**5, "is no JSON"),
    (b'{"a": ' + b"9" * 9999 + b"}", "is no JSON"),
  ],
)
def test_odd_json_is_told_with_its_file(content, message, tmp_path):
  path = tmp_path / "odd.json"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=f"{path} {message}"):
    files.read_json(path)


@pytest.mark.parametrize("kind", ["link", "pipe", "device"])
def test_odd_things_in_folders(kind, tmp_path):
  inner = tmp_path / "outer" / "inner"
  inner.mkdir(parents=True)
  path, _ = odd(inner, kind)
  for written in (True, False):
    if kind == "link" and not written:
      files.refuse_odd_in(tmp_path / "outer", written)
      continue
    with pytest.raises(OSError, match=f"{path} is a {kind}"):
      files.refuse_odd_in(tmp_path / "outer", written)
  (tmp_path / "link").symlink_to(tmp_path / "outer")
  with pytest.raises(OSError, match="link is a link where a folder"):
    files.refuse_odd_in(tmp_path / "link", True)


def test_links_that_go_around_have_an_end(tmp_path):
  (tmp_path / "a" / "b").mkdir(parents=True)
  (tmp_path / "a" / "b" / "c").symlink_to(tmp_path / "a")
  files.refuse_odd_in(tmp_path, False)
  os.mkfifo(tmp_path / "pipe")
  (tmp_path / "a" / "b" / "d").symlink_to(tmp_path / "pipe")
  with pytest.raises(OSError, match="d is a pipe where a regular file"):
    files.refuse_odd_in(tmp_path / "a", False)


ENTERS = """
import os, pathlib, sys
from moejax import files
path, inside = map(pathlib.Path, sys.argv[1:])
for _ in range(100):
  with files.locked(path):
    inside.mkdir()
    inside.rmdir()
    path.unlink()
"""


def test_a_lock_that_is_removed_and_made_anew_is_one(tmp_path):
  rest = (tmp_path / "new" / "lock", tmp_path / "inside")
  command = [sys.executable, "-c", ENTERS, *rest]
  several = [subprocess.Popen(command) for _ in range(3)]
  assert [process.wait() for process in several] == [0, 0, 0]


def test_a_lock_that_is_held_is_refused_or_waited_for(tmp_path):
  path = tmp_path / "lock"
  refused = pytest.raises(BlockingIOError)
  with files.locked(path), refused, files.locked(path, wait=False):
    pass
  with files.locked(path, wait=False):
    pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_named(number, monkeypatch, tmp_path):
  def flock(*args):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(fcntl, "flock", flock)
  refused = pytest.raises(OSError, match="lock'")
  with refused as caught, files.locked(tmp_path / "lock"):
    pass
  assert caught.value.errno == number
