"""Fields of a config: checked, built from, listed, read and set by name.

A section of a config builds something. Its fields are the parameters of what
builds it, as far as a config can hold what they are annotated with: bool, int,
float, str, None, lists and sections. So the type, the range, the default and
the meaning of a field are written once, where it is read.
"""

import ast
import collections
import contextlib
import dataclasses
import difflib
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

Factory = Callable[..., Any]
# Of a field: there is no such value.
EMPTY = inspect.Parameter.empty

# -- annotations --------------------------------------------------------------


# Compared by identity: what is in a union of annotations must have a hash.
@dataclasses.dataclass(frozen=True, eq=False)
class Names:
  """In `Annotated`: a str that is one of these names."""

  known: Collection[str]


@dataclasses.dataclass(frozen=True, eq=False)
class Range:
  """In `Annotated`: a number of at least `least`, and less than `below`."""

  least: int | float
  below: int | float = math.inf

  def __str__(self) -> str:
    below = f", and less than {self.below}" if self.below < math.inf else ""
    return f"{self.least} or more{below}"


@dataclasses.dataclass(frozen=True, eq=False)
class Section:
  """In `Annotated`: a section of a config, out of which something is built.

  The factory whose parameter this is gets a function: of what is `given`, to
  what the section builds.

  Attributes:
    factory: takes the section's fields; or a table of such by name, of which
      the section's field `kind` names one.
    given: parameters that code gives, and no config.
    optional: whether the factory gets None for one that is left out.
  """

  factory: Factory | Mapping[str, Factory]
  given: Collection[str] = ()
  optional: bool = False

  @property
  def kinds(self) -> Mapping[str, Factory]:
    """The factories by name; none where there is only one."""
    return self.factory if isinstance(self.factory, Mapping) else {}


Size = Annotated[int, Range(1)]
# A field of files; its words are joined.
Paths = Annotated[str, "parted by commas; * and ? match any letters"]

_TYPES = {kind: kind.__name__ for kind in (bool, int, float, str)}
_TYPES |= {types.NoneType: "None", Mapping: "dict", Sequence: "list"}


class Alternative(NamedTuple):
  """What `Annotated` says of one of the types that an annotation names."""

  about: Names | Range | Section | None
  entry: Any  # Annotation of the entries, of a list.
  line: str  # What the field is.


@functools.lru_cache(1000)
def alternatives(annotation: Any) -> dict[type, Alternative]:
  """Returns the types of `_TYPES` that an annotation names.

  None at all where one of them is something that no config can hold.
  """
  is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
  found = {}
  for each in typing.get_args(annotation) if is_union else (annotation,):
    is_noted = typing.get_origin(each) is Annotated
    plain, *notes = typing.get_args(each) if is_noted else (each,)
    about = next((n for n in notes if not isinstance(n, str)), None)
    line = next((n for n in notes if isinstance(n, str)), "")
    kind = typing.get_origin(plain) or plain
    if isinstance(about, Section):
      kind = Mapping
    if kind not in _TYPES:
      return {}
    entry = typing.get_args(plain)[0] if kind is Sequence else None
    found[kind] = Alternative(about, entry, line)
  return found


def section_of(annotation: Any) -> Section | None:
  """Returns the section that a field may be; None where it may not."""
  found = alternatives(annotation).get(Mapping)
  return found and found.about


def worded(annotation: Any) -> str:
  """Writes what a field may hold: "int, 1 or more or None"."""
  words = []
  for kind, (about, entry, _) in alternatives(annotation).items():
    word = _TYPES[kind]
    if isinstance(about, Names):
      word = " | ".join(about.known)
    elif isinstance(about, Range):
      word = f"{word}, {about}"
    elif entry:
      word = f"{word} of ({worded(entry)})"
    words.append(word)
  return " or ".join(words)


def fields_of(*sources: Factory, **annotations: Any) -> Callable:
  """Makes a factory's `**fields` stand for the parameters of others.

  A parameter that it names itself hides one of theirs. Annotations given here
  stand in place of theirs, or make a field that is None by default. What a
  field is may be said in any of the docstrings.
  """
  keyword = inspect.Parameter.KEYWORD_ONLY

  def decorate(factory):
    found = {}
    for source in sources:
      found |= inspect.signature(source).parameters
    for name, annotation in annotations.items():
      new = inspect.Parameter(name, keyword, default=None)
      found[name] = found.get(name, new).replace(annotation=annotation)
    own = dict(inspect.signature(factory).parameters)
    own.popitem()  # **fields
    rest = [p.replace(kind=keyword) for n, p in found.items() if n not in own]
    factory.__signature__ = inspect.Signature([*own.values(), *rest])
    factory.fields_of = sources
    return factory

  return decorate


def limited(factory: Factory, **annotations: Any) -> Factory:
  """Returns a factory of the same, with other annotations of some fields."""
  return fields_of(factory, **annotations)(lambda **fields: factory(**fields))


# -- checking and building ----------------------------------------------------


def build(
  factory: Factory | Mapping[str, Factory],
  section: Mapping[str, Any],
  where: str,
  **given: Any,
) -> Any:
  """Calls `factory`, of a table or alone, with a section's checked fields.

  ValueError names the field, and what may be in its place.
  """
  return _builder(Section(factory, given), section, where)(**given)


def _builder(about, section, where):
  """Returns a function of what is given, to what the section builds."""
  factory, parameters = chosen(about, section, where)
  known = {*parameters, "kind"} if about.kinds else parameters
  for name in section:
    if name not in known:
      near = "take it out of the config"
      if known:
        near = f"the nearest is {where}.{nearest(name, known)}"
      raise ValueError(f"{where}.{name} does not exist; {near}.")
  arguments = {}
  for name, parameter in parameters.items():
    annotation, there = parameter.annotation, f"{where}.{name}"
    if name in section:
      arguments[name] = checked(section[name], annotation, there)
    elif parameter.default is EMPTY:
      raise ValueError(f"{there} is missing; give it a value.")
    inner = section_of(annotation)
    if inner and not inner.optional and section.get(name) is None:
      # One that is left out, without a default, has no fields, which matters
      # if it is built.
      default = parameter.default
      own = default if isinstance(default, Mapping) else {}
      arguments[name] = functools.partial(build, inner.factory, own, there)
  return functools.partial(factory, **arguments)


def checked(value: Any, annotation: Any, where: str) -> Any:
  """Returns what a factory gets: for a section, a function that builds it.

  An int will do for a float. ValueError names the field, its value and what may
  be in its place.
  """
  kinds, kind = alternatives(annotation), _kind(value)
  if kind is int and int not in kinds:
    kind = float
  if kind not in kinds:
    raise ValueError(f"{where} is {value!r}; give it as {worded(annotation)}.")
  about, entry, _ = kinds[kind]
  if isinstance(about, Section):
    return _builder(about, value, where)
  if isinstance(about, Names):
    return one_of(value, about.known, where)
  if isinstance(about, Range) and not about.least <= value < about.below:
    raise ValueError(f"{where} is {value}; give {about}.")
  if kind is Sequence:
    if not value and int in alternatives(entry):
      raise ValueError(f"{where} is {value}; give at least one.")
    return tuple(
      checked(each, entry, f"{where}[{i}]") for i, each in enumerate(value)
    )
  if kind is str and re.search("[\ud800-\udfff]", value):
    raise ValueError(
      f"{where} is {value!r}, which is not UTF-8; rename what it names."
    )
  return value


def _kind(value):
  """Returns which of `_TYPES` it is; True is no int here."""
  if isinstance(value, (list, tuple)):
    return Sequence
  return Mapping if hasattr(value, "keys") else type(value)


def chosen(
  about: Section, section: Mapping[str, Any], where: str
) -> tuple[Factory, dict[str, inspect.Parameter]]:
  """Returns what builds a section, and the parameters that are its fields."""
  factory = about.factory
  if about.kinds:
    kind = one_of(section.get("kind", ""), about.kinds, f"{where}.kind")
    factory = about.kinds[kind]
  parameters = inspect.signature(factory).parameters
  # A linen module has a parent and a name, for which a config has no use.
  hidden = {*about.given, *(("name",) if "parent" in parameters else ())}
  return factory, {
    name: parameter
    for name, parameter in parameters.items()
    if name not in hidden and alternatives(parameter.annotation)
  }


def one_of(name: Any, names: Collection[str], where: str) -> str:
  """Returns the name; ValueError lists these, and the nearest, if not one."""
  if not isinstance(name, str) or name not in names:
    raise ValueError(
      f"{where} is {name!r}; choose one of {', '.join(map(repr, names))}"
      f" (the nearest is {nearest(name, names)!r})."
    )
  return name


def nearest(name: Any, known: Collection[str]) -> str:
  """Returns which of the names is most like this one."""
  return difflib.get_close_matches(str(name), list(known), 1, 0)[0]


# -- listing ------------------------------------------------------------------


class Field(NamedTuple):
  """A field of a config, or a section of it."""

  name: str  # With those of the sections that it is in: "config.seed".
  annotation: Any
  value: Any  # `EMPTY` where the config leaves it out.
  default: Any  # What that means; `EMPTY` where it must not be left out.
  line: str  # What it is.


def fields(
  annotation: Any, where: str, value: Any, default: Any = None, line: str = ""
) -> Iterator[Field]:
  """Yields a field, see `Field`, and of a section all within, left out or not.

  ValueError where a section is of an unknown kind.
  """
  kinds, about = alternatives(annotation), section_of(annotation)
  lines = [line, *(each.line for each in kinds.values())]
  yield Field(where, annotation, value, default, "; ".join(filter(None, lines)))
  entry = kinds[Sequence].entry if Sequence in kinds else None
  if section_of(entry) and _kind(value) is Sequence:
    for i, each in enumerate(value):
      yield from fields(entry, f"{where}[{i}]", each)
  if about is None:
    return
  section = value if _kind(value) is Mapping else {}
  if about.kinds:
    names = Annotated[str, Names(about.kinds)]
    kind = section.get("kind", EMPTY)
    yield Field(f"{where}.kind", names, kind, EMPTY, "which of these it is")
    if kind is EMPTY:
      return
  factory, parameters = chosen(about, section, where)
  # What kinds have in common need be said of one alone; its own line counts.
  said = collections.ChainMap(*map(_lines, (factory, *about.kinds.values())))
  for name, each in parameters.items():
    there, inner = f"{where}.{name}", section.get(name, EMPTY)
    line = said.get(name, "")
    yield from fields(each.annotation, there, inner, each.default, line)


@functools.cache
def _lines(factory):
  """Finds the first sentence about each parameter in docstrings."""
  factory = getattr(factory, "func", factory)  # of a partial
  found = {}
  for source in getattr(factory, "fields_of", ()):
    found |= _lines(source)
  for each in reversed(getattr(factory, "__mro__", [factory])):
    doc = inspect.cleandoc(each.__doc__ or "")
    about = re.findall(r"^  (\w+): (.*(?:\n {4}.*)*)", doc, re.M)
    found |= {name: sentence(text) for name, text in about}
  return found


def sentence(text: str | None) -> str:
  """Returns the first sentence of a docstring, or of a part, without its end.

  A dot within one, as in "(app. B)", is followed by no word.
  """
  line = " ".join((text or "").split())
  return re.split(r"\.(?= (?:A |[A-Z][a-z]))|\.$", line)[0]


# -- reading and setting ------------------------------------------------------


class ReadError(ValueError):
  """A command line cannot be understood."""


def written(value: Any) -> str:
  """Writes a value as `value_of` reads it."""
  if isinstance(value, (list, tuple)):
    words = [written(each) for each in value]
    if words and all(re.fullmatch(r"[\w.+-]+", word) for word in words):
      return ",".join(words) + ("," if len(words) == 1 else "")
  return value if isinstance(value, str) else repr(value)


def value_of(field: Field, words: Sequence[str]) -> Any:
  """Reads the value of a field from the words that follow its name.

  None, True, False and numbers are written as Python does (1e3 is a whole one),
  a str as it is. A list is parted by commas, with brackets or without; a
  section is a dict as Python writes it or, where it has kinds, the name of one:
  then it keeps those of its fields that this kind has as well. Without a word a
  field becomes True; several words are a list, or paths.

  Raises:
    ReadError: says what the field can hold.
    ValueError: the section has no such kind.
  """
  name, annotation, old, *_ = field
  kinds, about = alternatives(annotation), section_of(annotation)
  text = ",".join(words) if words else "True"
  if not words and bool not in kinds:
    problem = f"--{name} is without a value"
  elif len(words) > 1 and Sequence not in kinds and annotation != Paths:
    problem = f"what is {words[1]!r}? --{name} takes one value"
  else:
    problem = f"--{name}={text} cannot be read"
    for value in _meanings(text, about):
      if _kind(value) in kinds:
        if value == {"kind": text} and _kind(old) is Mapping:
          _, fitting = chosen(about, value, name)
          value = {n: v for n, v in old.items() if n in fitting} | value
        return value
  example = ""
  if about:
    first = "kind" if about.kinds else next(iter(chosen(about, {}, "")[1]))
    example = f", as in {{{first!r}: ...}}"
  raise ReadError(f"{problem}; give it as {worded(annotation)}{example}.")


_CONSTANTS = (
  dict.fromkeys(("none", "null"))
  | dict.fromkeys(("true", "t", "1"), True)
  | dict.fromkeys(("false", "f", "0"), False)
)


def _meanings(text, about):
  """Yields what a text may mean; of what a field can hold the first counts."""
  word = text.strip().lower()
  if word in _CONSTANTS:
    yield _CONSTANTS[word]
  with contextlib.suppress(ValueError):
    yield int(word)
  with contextlib.suppress(ValueError):
    number = float(word)
    if number.is_integer():
      yield int(number)
    yield number
  if about and about.kinds and text.isidentifier():
    yield {"kind": text}
  with contextlib.suppress(SyntaxError, TypeError, ValueError):
    literal = ast.literal_eval(text.strip())
    if not isinstance(literal, str):
      yield tuple(literal) if isinstance(literal, list) else literal
  # A list has a comma or brackets where it could be a word.
  if not re.search(r"[,(\[]", text):
    yield text
  inner = text.strip()
  if inner[:1] in ("(", "[") and inner[-1:] in (")", "]"):
    inner = inner[1:-1]
  yield tuple(filter(None, map(str.strip, inner.split(","))))
  # No word begins like a section.
  if not (about and text.startswith("{")):
    yield text


def override(
  config: Any,
  changes: Sequence[tuple[str, Sequence[str]]],
  fields_of_config: Callable[[Any], Iterator[Field]],
) -> None:
  """Sets fields to what a command line says, whether the file has them or not.

  A section is set before what is in it, and its kind, which is one more way to
  set it, before its other fields, in whatever order they come. Errors as of
  `value_of`.
  """
  found = {}

  def depth(change):
    return len(_steps(change[0].removesuffix(".kind")))

  for name, words in sorted(changes, key=depth):
    found = found or {field.name: field for field in fields_of_config(config)}
    if name not in found:
      raise ReadError(_unknown(name, found))
    field = found[name.removesuffix(".kind")]
    set_field(config, field.name, value_of(field, words))
    if section_of(field.annotation):
      found = {}  # By another kind there are other fields.


def _unknown(name, found):
  """Says what is wrong with the name of a field that is none."""
  section, _, last = name.rpartition(".")
  about = section_of(found[section].annotation) if section in found else None
  for kind in about.kinds if about else ():
    if last in chosen(about, {"kind": kind}, section)[1]:
      now = found[f"{section}.kind"].value
      now = "of no kind" if now is EMPTY else f"of the kind {now!r}"
      return (
        f"{section}, which is {now}, has no field {last}; it has by"
        f" --{section}={kind}."
      )
  tail = name.removeprefix("config")
  likely = [each for each in found if tail.strip(".") and each.endswith(tail)]
  return (
    f"the config has no field {name}; the nearest is"
    f" {' or '.join(likely) or nearest(name, found)}."
  )


def set_field(config: Any, name: str, value: Any) -> None:
  """Sets a field, such as "config.a.b[0].c", and makes its sections."""

  def set_in(section, steps):
    if not steps:
      return value
    first, *rest = steps
    if _kind(section) is Sequence:
      entries = list(section)
      entries[int(first)] = set_in(dict(entries[int(first)]), rest)
      return tuple(entries)
    inner = section.get(first)
    if _kind(inner) not in (Mapping, Sequence):
      inner = {}
    section[first] = set_in(inner, rest)
    return section

  set_in(config, _steps(name))


def _steps(name):
  """Parts "config.a.b[0].c" into a, b, 0, c."""
  return re.findall(r"[^.\[\]]+", name)[1:]
