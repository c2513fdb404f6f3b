"""Files that a crash leaves whole: the old content or the new, never half."""

import os
import pathlib


def write_whole(path: pathlib.Path, text: str) -> None:
  """Writes UTF-8 text to a draft beside `path`, then puts it in its place."""
  # By process: two that write at once must not share a draft.
  draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
  draft.write_text(text, encoding="utf-8", newline="\n")
  draft.replace(path)
