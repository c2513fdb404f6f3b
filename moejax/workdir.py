"""What a run keeps in its workdir, next to what it writes as it goes."""

import json
import pathlib
from typing import Any, TypeVar

from ml_collections import ConfigDict

from moejax import files
from moejax.data import corpus, pieces, vocab

CONFIG_FILE = "config.json"
DIGEST_FILE = "vocabulary.digest"
Vocabulary = TypeVar("Vocabulary", vocab.Vocabulary, pieces.Pieces)


def is_run(workdir: pathlib.Path) -> bool:
  """Returns whether a run was made there."""
  return (workdir / CONFIG_FILE).exists()


def check_same(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Refuses to go on in a workdir with another config than it was made with.

  Only the layout may change.

  Raises:
    ValueError: shows where the two differ.
  """
  if not is_run(workdir):
    return
  old = _flat(recall(workdir).to_dict())
  new = _flat(json.loads(_as_json(config)))
  lines = [
    f"  {name}: {old.get(name)!r} there, {new.get(name)!r} now"
    for name in sorted(old | new)
    # A run may move to other devices; it computes the same there.
    if old.get(name) != new.get(name) and not name.startswith("config.layout")
  ]
  if lines:
    raise ValueError(
      f"{workdir} was made with another config:\n"
      + "\n".join(lines)
      + "\nGive a new --workdir, or the config it was made with."
    )


def remember(
  config: ConfigDict, vocabulary: corpus.Words, workdir: pathlib.Path
) -> None:
  """Makes a workdir that of a run: writes its config and vocabulary.

  To be called when all else has shown to be sound, so that a mistake in a
  config does not stay in the way of its correction.
  """
  if not is_run(workdir):
    vocabulary.save(workdir / vocabulary.FILE)
    files.write_whole(workdir / DIGEST_FILE, vocabulary.digest + "\n")
    files.write_whole(workdir / CONFIG_FILE, _as_json(config) + "\n")


def recall(workdir: pathlib.Path) -> ConfigDict:
  """Reads the config that a workdir was made with.

  Raises:
    FileNotFoundError: it is no workdir of a run.
  """
  if not is_run(workdir):
    raise FileNotFoundError(
      f"{workdir} holds no {CONFIG_FILE}: no run was made there; give the"
      " --workdir of a `moejax train`."
    )
  return ConfigDict(files.read_json(workdir / CONFIG_FILE))


def vocabulary(kind: type[Vocabulary], workdir: pathlib.Path) -> Vocabulary:
  """Reads the vocabulary that a run was made with.

  Raises:
    FileNotFoundError: the run lost it.
    ValueError: the file is no such vocabulary, or another one.
  """
  path = workdir / kind.FILE
  if not path.exists():
    raise FileNotFoundError(
      f"{path} is gone, without which a run cannot know its words; put the file"
      " back, or train in a new --workdir."
    )
  found = kind.load(path)
  noted = workdir / DIGEST_FILE
  # Runs of older versions noted none.
  own = files.read(noted).decode().strip() if noted.exists() else found.digest
  if found.digest != own:
    raise ValueError(
      f"{path}, of digest {found.digest}, is not the one that the run was"
      f" trained with, {own}; put that file back, or train in a new --workdir."
    )
  return found


def _as_json(config: ConfigDict) -> str:
  return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def _flat(values: Any, name: str = "config") -> dict[str, Any]:
  if not isinstance(values, dict):
    return {name: values}
  flat = {}
  for key, value in values.items():
    flat |= _flat(value, f"{name}.{key}")
  return flat
