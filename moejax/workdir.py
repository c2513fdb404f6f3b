"""What a run keeps in its workdir, next to what it writes as it goes."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from moejax import files

CONFIG_FILE = "config.json"
DIGEST_FILE = "vocabulary.digest"
TEXT_FILE = "text.json"
RESULT_FILE = "result.json"
# Of a model that was imported, what came with it.
FOREIGN = "hugging_face"
# A tokenizer, see `data.packing`: which takes JAX to import, as this does not.
Vocabulary = TypeVar("Vocabulary")

# Fields that may change from one start to the next: those that cannot change a
# number that the run has come to so far. All others may not.
_FREE = (
  # Where it is computed: the same, but for rounding, is computed everywhere.
  "config.layout.",
  # How long: no schedule looks ahead to the end.
  "config.train.steps.",
  # When to look and to save, and what to keep: a validation changes nothing.
  *(f"config.train.{each}_every." for each in ("log", "eval", "checkpoint")),
  "config.train.keep.",
)
# Where the text lies, and what is refused in it: whether it is the same text
# is told by its digest, of every split.
_TEXT = tuple(
  f"config.data.{each}."
  for each in ("train", "validation", "test", "data_dir", "strict")
)
_BACK = "put the file back from a copy, or train in a new --workdir."


def is_run(workdir: files.Path) -> bool:
  """Returns whether a run was made there; raises where its config is gone."""
  if files.exists(workdir / CONFIG_FILE):
    return True
  # All of these are written after it.
  for name in ("checkpoints", "metrics.jsonl", RESULT_FILE):
    if files.exists(workdir / name):
      raise FileNotFoundError(
        f"{workdir / CONFIG_FILE} is gone, though {name} of a run lies there;"
        f" {_BACK}"
      )
  return False


def knows_words(workdir: files.Path) -> bool:
  """Returns whether it had a vocabulary; an imported model may have none."""
  foreign = files.exists(workdir / FOREIGN)
  return not foreign or files.exists(workdir / DIGEST_FILE)


def recall(workdir: files.Path) -> dict[str, Any]:
  """Reads the values of the config that a workdir was made with.

  FileNotFoundError where it is none, ValueError where the file is damaged.
  """
  if not is_run(workdir):
    raise FileNotFoundError(
      f"{workdir} holds no {CONFIG_FILE}: no run was made there; give the"
      " --workdir of a `moejax train`."
    )
  return _sound(workdir / CONFIG_FILE)


def check_same(values: Mapping[str, Any], workdir: files.Path) -> None:
  """Refuses another config than a workdir was made with; shows the difference.

  What cannot change the numbers so far may differ, see _FREE; and so may where
  the text lies, which `check_text` is then to be asked about.
  """
  if not is_run(workdir):
    return
  # A run of an older version noted no text.
  noted = _TEXT if files.exists(workdir / TEXT_FILE) else ()
  lines = [
    f"  {name[:-1]}: {old!r} there, {new!r} now"
    for name, old, new in _changes(values, workdir)
    if not name.startswith(_FREE + noted)
  ]
  if lines:
    raise ValueError(
      f"{workdir} was made with another config:\n"
      + "\n".join(lines)
      + "\nGive a new --workdir, or the config it was made with."
    )


def other_text(values: Mapping[str, Any], workdir: files.Path) -> bool:
  """Returns whether the text of a run is said to lie elsewhere now."""
  return any(name.startswith(_TEXT) for name, _, _ in _changes(values, workdir))


def check_text(
  text: Mapping[str, str],
  workdir: files.Path,
  before: Mapping[str, str] | None = None,
) -> None:
  """Refuses splits whose digests are not those a run began with.

  What those were, a checkpoint tells, or else the workdir, if it noted any.
  """
  if before is None:
    path = workdir / TEXT_FILE
    before = _sound(path) if files.exists(path) else text
  # That of an imported model has none before it is trained.
  differ = [s for s in before and text if before.get(s) != text[s]]
  if differ:
    raise ValueError(
      f"the text of {', '.join(differ)} has changed since the run in {workdir}"
      " began; give the files it began with, or a new --workdir."
    )


def remember(
  values: Mapping[str, Any],
  vocabulary: Any,
  text: Mapping[str, str],
  workdir: files.Path,
  made: bool = False,
) -> None:
  """Makes a workdir that of a run: writes its config, vocabulary and text.

  To be called when all else has shown to be sound. Of a run that goes on it
  writes what of its config has changed, and removes the result of its end so
  far. `text` has the digest of each split; `made` says that all else of a new
  run lies there already, so that nobody finds it without its checkpoint. What
  was imported may have no vocabulary.
  """
  is_new, noted = made or not is_run(workdir), workdir / TEXT_FILE
  if is_new and vocabulary is not None:
    vocabulary.save(workdir / vocabulary.FILE)
    files.write_whole(workdir / DIGEST_FILE, vocabulary.digest + "\n")
  # An imported model begins without text.
  if is_new or (files.exists(noted) and not _sound(noted)):
    files.write_whole(noted, _as_json(text))
  elif not list(_changes(values, workdir)):
    return
  (workdir / RESULT_FILE).unlink(missing_ok=True)
  files.write_whole(workdir / CONFIG_FILE, _as_json(values))


def vocabulary(
  kind: type[Vocabulary], workdir: files.Path, **fields: Any
) -> Vocabulary:
  """Reads the vocabulary that a run was made with, and takes no other one.

  The fields are what its kind is loaded by besides the file.
  """
  path, noted = workdir / kind.FILE, workdir / DIGEST_FILE
  try:
    found = kind.load(path, **fields)
  except FileNotFoundError:
    if not knows_words(workdir):
      raise FileNotFoundError(
        f"{workdir} knows no words: the model was imported from a folder"
        f" without {kind.FILE}; import it from one that has it, or give it ids"
        " in Python, by moejax.load."
      ) from None
    raise FileNotFoundError(
      f"{path} is gone, without which a run cannot know its words; {_BACK}"
    ) from None
  except ValueError as error:
    raise ValueError(f"{error}; {_BACK}") from None
  # Runs of older versions noted none.
  if files.exists(noted):
    own = files.read(noted).decode(errors="replace").strip()
    if found.digest != own:
      raise ValueError(
        f"{path}, of digest {found.digest}, is not the one that the run was"
        f" trained with, by {noted} of digest {own:.40}; {_BACK}"
      )
  return found


def _changes(
  values: Mapping[str, Any], workdir: files.Path
) -> Iterator[tuple[str, Any, Any]]:
  """Yields fields that differ: name ("config.train.steps."), there, now."""

  def flat(values, name):
    if not isinstance(values, dict):
      return {name: values}
    inner = (flat(value, f"{name}{key}.") for key, value in values.items())
    return {k: v for fields in inner for k, v in fields.items()}

  old = flat(recall(workdir), "config.")
  new = flat(json.loads(_as_json(values)), "config.")
  for name in sorted(old | new):
    if old.get(name) != new.get(name):
      yield name, old.get(name), new.get(name)


def _sound(path: files.Path) -> dict[str, Any]:
  try:
    return files.read_json(path)
  except ValueError as error:
    raise ValueError(f"{error}; {_BACK}") from None


def _as_json(values: Mapping[str, Any]) -> str:
  return json.dumps(values, indent=2, sort_keys=True) + "\n"
