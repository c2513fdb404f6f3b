"""Scripts that are written without spaces between words."""

import collections
import re

# Letters of each by Unicode's blocks; marks on letters are among them.
_BLOCKS = {
  "Han": "々〇\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af",
  "Kana": "\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9f",
  "Thai": "\u0e01-\u0e3a\u0e40-\u0e4e",
  "Lao": "\u0e81-\u0edf",
  "Tibetan": "\u0f00-\u0fff",
  "Burmese": "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f",
  "Khmer": "\u1780-\u17ff",
  "Tai": "\u1950-\u19df\u1a20-\u1aaf",
  "Javanese": "\ua980-\ua9df",
}
_RUN = re.compile("|".join(f"(?P<{n}>[{b}]+)" for n, b in _BLOCKS.items()))
_LETTER = re.compile(r"[^\W\d_]")


def main_script(text: str) -> str:
  """Names the script of most letters, if it goes without spaces; else "".

  Japanese is "Kana", though most of its letters may be Han.
  """
  counts: collections.Counter[str] = collections.Counter()
  for run in _RUN.finditer(text):
    counts[run.lastgroup or ""] += len(run[0])
  # Marks are letters above, and none to \w.
  others = len(_LETTER.findall(_RUN.sub("", text)))
  if not counts or counts.total() <= others:
    return ""
  if counts["Kana"] > 0.1 * counts.total():
    return "Kana"
  return counts.most_common(1)[0][0]


def is_cut(text: str, script: str) -> bool:
  """Returns whether text in such a script has spaces between words even so.

  Args:
    text: of which most letters are of the script.
    script: as `main_script` names it.
  """
  runs = re.findall(f"[{''.join(_BLOCKS.values())}]+", text)
  # Words of Han and Kana have one letter or two; those of the others, with
  # their marks, about five.
  most = 3 if script in ("Han", "Kana") else 8
  return sum(map(len, runs)) <= most * len(runs)
