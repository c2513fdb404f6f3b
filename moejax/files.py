"""Files that a crash leaves whole: the old content or the new, never half."""

import os
import pathlib


def write_whole(path: pathlib.Path, content: str | bytes) -> None:
  """Writes bytes, or text in UTF-8, to a draft, then puts it in its place."""
  # By process: two that write at once must not share a draft.
  draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
  draft.write_bytes(content.encode() if isinstance(content, str) else content)
  draft.replace(path)
