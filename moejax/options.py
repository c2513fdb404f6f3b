"""Fields of a config on a command line: listed, read, and set.

What there is, and what it may hold, is what the annotations say of that which a
config builds, see `moejax.named`.
"""

import ast
import dataclasses
import functools
import inspect
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from moejax import named
from moejax.named import Names

# Of a field: there is no such value.
EMPTY = dataclasses.MISSING
# A field of files; its words are joined.
Paths = Annotated[str, "parted by commas; * and ? match any letters"]


class ReadError(ValueError):
  """A command line does not say what a field is to be."""


# -- listing ------------------------------------------------------------------


class Field(NamedTuple):
  """A field of a config, or a section of it.

  Attributes:
    name: with those of the sections that it is in, as in "config.seed".
    annotation: what it may hold.
    value: what it holds; `EMPTY` where the config leaves it out.
    default: what that means; `EMPTY` where it must not be left out.
    line: what it is.
  """

  name: str
  annotation: Any
  value: Any
  default: Any
  line: str


def fields(
  annotation: Any,
  where: str,
  value: Any = EMPTY,
  default: Any = EMPTY,
  line: str = "",
) -> Iterator[Field]:
  """Yields a field and, of a section, all within, left out or not.

  Args:
    annotation: what the field may hold.
    where: its name.
    value: what it holds.
    default: what it means to leave it out.
    line: what it is, where the annotation does not say that.

  Raises:
    ValueError: a section is of an unknown kind.
  """
  said = next((a.line for a in named.alternatives(annotation) if a.line), "")
  line = "; ".join(filter(None, (line, said)))
  yield Field(where, annotation, value, default, line)
  entry = named.entry_of(annotation)
  if entry and named.section_of(entry) and named.is_a(value, Sequence):
    for i, each in enumerate(value):
      yield from fields(entry, f"{where}[{i}]", each)
  about = named.section_of(annotation)
  if about is None:
    return
  section = value if named.is_a(value, Mapping) else {}
  if kinds := isinstance(about.factory, Mapping):
    kind = section.get("kind", EMPTY)
    names = Annotated[str, Names(about.factory)]
    yield Field(f"{where}.kind", names, kind, EMPTY, "which of these it is")
    if kind is EMPTY:
      return
  factory, parameters = named.chosen(about, section, where)
  # What kinds have in common need be said of one alone.
  lines = {}
  for each in about.factory.values() if kinds else ():
    lines = _lines(each) | lines
  lines |= _lines(factory)
  for name, each in parameters.items():
    yield from fields(
      each.annotation,
      f"{where}.{name}",
      section.get(name, EMPTY),
      EMPTY if each.default is each.empty else each.default,
      lines.get(name, ""),
    )


@functools.cache
def _lines(factory: named.Factory) -> dict[str, str]:
  """Finds the first sentence about each parameter in docstrings."""
  if isinstance(factory, functools.partial):
    factory = factory.func
  documented = factory.__mro__[::-1] if isinstance(factory, type) else [factory]
  found = {}
  for source in getattr(factory, "fields_of", ()):
    found |= _lines(source)
  for each in documented:
    name = None  # of the parameter that the lines are about
    for line in inspect.cleandoc(each.__doc__ or "").splitlines():
      if not line.startswith(" ") and line:
        name = "" if line in ("Args:", "Attributes:") else None
      elif name is not None and (begin := re.match(r" {2,4}(\w+): ", line)):
        name = begin[1]
        found[name] = line[begin.end() :]
      elif name:
        found[name] += " " + line.strip()
  return {name: sentence(text) for name, text in found.items()}


def sentence(text: str) -> str:
  """Returns the first sentence of a docstring, or of a part, without its end.

  A dot within one, as in "(app. B)", is followed by no word.
  """
  line = " ".join((text or "").split())
  return re.split(r"\.(?= (?:A |[A-Z][a-z]))|\.$", line)[0]


# -- reading and writing ------------------------------------------------------


def written(value: Any) -> str:
  """Writes a value as `read` takes it."""
  if isinstance(value, (list, tuple)):
    words = [written(each) for each in value]
    if words and all(re.fullmatch(r"[\w.+-]+", word) for word in words):
      return ",".join(words) + ("," if len(words) == 1 else "")
  return value if isinstance(value, str) else repr(value)


def read(text: Any, annotation: Any, where: str) -> Any:
  """Reads a value, as annotated, from a command line.

  None, True, False and numbers are written as Python does (1e3 is a whole one),
  a str as it is. A list is parted by commas, with brackets or without; a
  section is a dict as Python writes it or, where it has kinds, the name of one.

  Args:
    text: or a value of what was read, within a list or a section.
    annotation: what the field may hold.
    where: its name.

  Raises:
    ReadError: the field cannot hold it; says what it can.
    ValueError: a section has no such kind; says which there are.
  """
  about = named.section_of(annotation)
  kinds = about and isinstance(about.factory, Mapping) and about.factory
  by_kind = {each.kind: each for each in named.alternatives(annotation)}
  for kind, reader in _READERS.items():
    if kind is Mapping and kinds and str(text).isidentifier():
      return {"kind": named.known(text, kinds, where)}
    # What could be either: no str begins like a dict, a list has a comma.
    if kind is str and about and str(text).startswith("{"):
      break
    is_word = isinstance(text, str) and not re.search(r"[,(\[]", text)
    if kind is Sequence and str in by_kind and is_word:
      continue
    if kind in by_kind:
      try:
        return reader(text, by_kind[kind], where)
      except (ArithmeticError, KeyError, SyntaxError, TypeError, ValueError):
        pass
  wanted = named.worded(annotation)
  if about:
    first = "kind" if kinds else next(iter(named.chosen(about, {}, "")[1]))
    wanted += f", as in {{{first!r}: ...}}"
  raise ReadError(f"--{where}={text} cannot be read; give it as {wanted}.")


def _within(value: Any, annotation: Any, where: str) -> Any:
  """Reads what is in a list or a section; leaves it to `make` to refuse it."""
  try:
    return read(value, annotation, where)
  except ValueError:
    return value


def _read_none(text, *_):
  return {"none": None, "null": None}[str(text).lower()]


def _read_bool(text, *_):
  words = {True: ("true", "t", "1"), False: ("false", "f", "0")}
  (value,) = (v for v, said in words.items() if str(text).lower() in said)
  return value


def _read_int(text, *_):
  try:
    return int(str(text))
  except ValueError:
    number = _read_float(text)
  if not number.is_integer():
    raise ValueError
  return int(number)


def _read_float(text, *_):
  return float(str(text))


def _read_section(text, each, where):
  section = ast.literal_eval(text) if isinstance(text, str) else text
  if not named.is_a(section, Mapping):
    raise TypeError
  fields = dict(section)
  try:
    _, parameters = named.chosen(each.about, fields, where)
  except ValueError:
    return fields
  return fields | {
    name: _within(fields[name], parameter.annotation, f"{where}.{name}")
    for name, parameter in parameters.items()
    if name in fields
  }


def _read_list(text, each, where):
  entries = text
  if isinstance(text, str):
    # Without brackets and the comma that may come last.
    inner = re.sub(r"^[\[(]|[\])]$", "", text.strip()).strip().removesuffix(",")
    try:
      entries = ast.literal_eval(f"({inner},)") if inner else ()
    except (SyntaxError, ValueError):
      entries = [word.strip() for word in inner.split(",")]
  elif not named.is_a(text, Sequence):
    raise TypeError
  return tuple(_within(each_one, each.entry, where) for each_one in entries)


def _read_str(text, *_):
  if not isinstance(text, str):
    raise TypeError
  return text


# In the order in which what is written could be meant.
_READERS = {
  types.NoneType: _read_none,
  bool: _read_bool,
  int: _read_int,
  float: _read_float,
  Mapping: _read_section,
  Sequence: _read_list,
  str: _read_str,
}


# -- setting ------------------------------------------------------------------


def override(
  config: Any,
  changes: Sequence[tuple[str, Sequence[str]]],
  fields_of_config: Callable[[Any], Iterable[Field]],
) -> None:
  """Sets fields to what a command line says, whether the file has them or not.

  A section is set before what is in it, and its kind before its other fields,
  in whatever order they come. By the name of a kind alone a section keeps those
  of its fields that this kind has as well.

  Args:
    config: to be changed.
    changes: names of fields, which begin with "config.", and words: none mean
      True; several are a list, or paths.
    fields_of_config: lists what a config can hold.

  Raises:
    ReadError: there is no such field, or it cannot hold this; says what there
      is, or what it can.
    ValueError: a section is of an unknown kind.
  """

  def depth(change):
    return len(_steps(change[0].removesuffix(".kind")))

  found = {}
  for name, words in sorted(changes, key=depth):
    found = found or {field.name: field for field in fields_of_config(config)}
    if name not in found:
      raise ReadError(_unknown(name, found))
    value = _value(found[name], words)
    with config.unlocked(), config.ignore_type():
      _set(config, _steps(name), value)
    # By another kind there are other fields.
    if named.section_of(found[name].annotation) or name.endswith(".kind"):
      found = {}


def meant(fields: Iterable[Field], name: str) -> list[str]:
  """Returns the fields whose names end in this one."""
  return [each.name for each in fields if each.name.endswith(f".{name}")]


def _unknown(name: str, found: Mapping[str, Field]) -> str:
  section, _, last = name.rpartition(".")
  about = named.section_of(found[section].annotation) if section in found else 0
  if about and isinstance(about.factory, Mapping):
    now = found[f"{section}.kind"].value
    now = "of no kind" if now is EMPTY else f"of the kind {now!r}"
    for kind in about.factory:
      if last in named.chosen(about, {"kind": kind}, section)[1]:
        return (
          f"{section}, which is {now}, has no field {last}; it has by"
          f" --{section}={kind}."
        )
  tail = name.removeprefix("config")
  likely = [each for each in found if tail.strip(".") and each.endswith(tail)]
  return (
    f"the config has no field {name}; the nearest is"
    f" {' or '.join(likely) or named.nearest(name, found)}."
  )


def _value(field: Field, words: Sequence[str]) -> Any:
  """Reads the value of a field from the words that follow its name."""
  name, annotation, old = field[:3]
  wanted = named.worded(annotation)
  kinds = [each.kind for each in named.alternatives(annotation)]
  if not words and bool not in kinds:
    raise ReadError(f"--{name} is without a value; give it as {wanted}.")
  if len(words) > 1 and Sequence not in kinds and annotation != Paths:
    raise ReadError(
      f"what is {words[1]!r}? --{name} takes one value; give it as {wanted}."
    )
  text = ",".join(words) if words else "True"
  value = read(text, annotation, name)
  if value == {"kind": text} and isinstance(old, Mapping):
    about = named.section_of(annotation)
    kept = named.chosen(about, value, name)[1]
    return {n: v for n, v in old.items() if n in kept} | value
  return value


def _steps(name: str) -> list[str]:
  """Parts "config.a.b[0].c" into a, b, 0, c."""
  return re.findall(r"[^.\[\]]+", name)[1:]


def _set(config: Any, steps: Sequence[str], value: Any) -> Any:
  """Sets what is so many steps down, in place but for lists; returns all."""
  if not steps:
    return value
  first, *rest = steps
  if named.is_a(config, Sequence):
    i = int(first)
    return (*config[:i], _set(dict(config[i]), rest, value), *config[i + 1 :])
  inner = config.get(first)
  if rest and not any(named.is_a(inner, each) for each in (Mapping, Sequence)):
    inner = {}
  config[first] = _set(inner, rest, value)
  return config
