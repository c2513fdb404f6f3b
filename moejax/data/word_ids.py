"""Word ids kept beside the prepared corpus they are made of.

They are made once, by one process, which holds no more than a sentence of them;
every start after that, and every other process, maps them into memory.
"""

import contextlib
import fcntl
import hashlib
import os
import pathlib
import shutil
import socket
import sys
from collections.abc import Callable, Iterator

import numpy as np

from moejax.data import text
from moejax.data.corpora import Records
from moejax.data.vocab import Vocabulary

_FOLDER = "word_ids"
# To be raised with any change of the ids that a text becomes: `vocab.words`,
# `vocab.tokens`, `Vocabulary.encode`, `text.write_tokens`.
_VERSION = 1


def tokenise(
  texts: Records, vocabulary: Vocabulary, split: Callable[[str], list[str]]
) -> text.Tokens:
  """Returns what `text.tokenise` does; makes it where it is not kept.

  What is kept is found by the corpus, the split, the vocabulary and the name of
  `split`. It is whole or not there at all, and of several processes one makes
  it while the others wait. Where nothing can be written it is made in memory.

  Args, raises: as `text.tokenise`.
  """
  folder = texts.folder / _FOLDER
  try:
    kept = folder / _key(texts, vocabulary, split)
    if not kept.exists():
      folder.mkdir(exist_ok=True)
      with _alone_in(folder):
        if not kept.exists():
          _make(kept, texts, vocabulary, split)
    return text.Tokens(*(_map(kept / name) for name in text.Tokens._fields))
  except OSError as error:
    print(
      f"word ids of {len(texts):,} sentences are made in memory, at every start"
      f" ({error})",
      file=sys.stderr,
    )
    return text.tokenise(texts, vocabulary, split)


def _key(
  texts: Records, vocabulary: Vocabulary, split: Callable[[str], list[str]]
) -> str:
  """Digests all that the ids depend on.

  Of the prepared files only names, sizes and times: TFDS never changes a copy
  in place, and to read lm1b takes longer than all else at a start.
  """
  parts = [_VERSION, texts.split, split.__name__]
  for path in sorted(texts.folder.iterdir()):
    if path.is_file():
      parts += [path.name, path.stat().st_size, path.stat().st_mtime_ns]
  parts += vocabulary.decode(range(len(vocabulary)))
  everything = "\n".join(map(str, parts)).encode()
  return hashlib.blake2b(everything, digest_size=12).hexdigest()


def _make(
  kept: pathlib.Path,
  texts: Records,
  vocabulary: Vocabulary,
  split: Callable[[str], list[str]],
) -> None:
  print(
    f"turning {len(texts):,} sentences into word ids (once), in {kept}",
    file=sys.stderr,
  )
  # By machine: a lock may not reach another one. On this one, a draft that is
  # there is what a killed process left.
  draft = kept.with_suffix(f".{socket.gethostname()}.draft")
  shutil.rmtree(draft, ignore_errors=True)
  draft.mkdir()
  try:
    with contextlib.ExitStack() as stack:
      files = [
        stack.enter_context(open(draft / name, "wb"))
        for name in text.Tokens._fields
      ]
      text.write_tokens(texts, vocabulary, split, *files)
      for file in files:
        file.flush()
        os.fsync(file.fileno())
    draft.rename(kept)
  except OSError:
    # Another machine may have been first.
    if not kept.exists():
      raise
  finally:
    shutil.rmtree(draft, ignore_errors=True)


def _map(path: pathlib.Path) -> np.ndarray:
  return np.memmap(path, np.int32, mode="r").view(np.ndarray)


@contextlib.contextmanager
def _alone_in(folder: pathlib.Path) -> Iterator[None]:
  with open(folder / "lock", "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield
