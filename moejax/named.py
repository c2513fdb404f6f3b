"""Objects by name: checked calls with the fields of a section of a config.

The fields of a section are the parameters of what it builds, as far as a config
can hold what they are annotated with: bool, int, float, str, None, lists and
sections. So types, ranges, names to choose from, defaults, and a line of what a
field is, are written once, where it is read: `make` checks by them, `fields`
lists them, and `read` takes values from a command line.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import (
  Callable,
  Collection,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
)
from typing import Annotated, Any, NamedTuple

Factory = Callable[..., Any]
# Of a field: there is no such value.
EMPTY = dataclasses.MISSING


class ReadError(ValueError):
  """A command line does not say what a field is to be."""


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
  """

  factory: Factory | Mapping[str, Factory]
  given: Collection[str] = ()


Size = Annotated[int, Range(1)]


def fields_of(
  *sources: Factory, **annotations: Any
) -> Callable[[Factory], Factory]:
  """Makes a factory's `**fields` stand for the parameters of others.

  A parameter that it names itself hides one of theirs. What they are is said in
  any of the docstrings.

  Args:
    *sources: factories whose parameters these are.
    **annotations: in place of theirs; of a name that they do not have, of a
      field that is None by default.
  """

  def decorate(factory):
    rest = {}
    for source in sources:
      rest |= inspect.signature(source).parameters
    for name, annotation in annotations.items():
      default = rest[name].default if name in rest else None
      rest[name] = inspect.Parameter(
        name, _KEYWORD, default=default, annotation=annotation
      )
    own = dict(inspect.signature(factory).parameters)
    (fields,) = [n for n, each in own.items() if each.kind is each.VAR_KEYWORD]
    del own[fields]
    rest = [p.replace(kind=_KEYWORD) for n, p in rest.items() if n not in own]
    factory.__signature__ = inspect.Signature([*own.values(), *rest])
    factory.fields_of = sources
    return factory

  return decorate


_KEYWORD = inspect.Parameter.KEYWORD_ONLY

# -- building -----------------------------------------------------------------


def make(
  factory: Factory | Mapping[str, Factory],
  section: Mapping[str, Any],
  where: str,
  **given: Any,
) -> Any:
  """Calls `factory` with a section's fields, checked by name and type.

  Args:
    factory: or a table of such, see `Section`.
    section: fields and their values.
    where: the section's own name.
    **given: what no config can hold.

  Raises:
    ValueError: names the field, and what may be in its place.
  """
  about = Section(factory, given)
  _check(section, about, where)
  factory, parameters = chosen(about, section, where)
  arguments = {
    name: _built(section.get(name), parameter.annotation, f"{where}.{name}")
    for name, parameter in parameters.items()
    if name in section or section_of(parameter.annotation)
  }
  return factory(**arguments, **given)


def _built(value: Any, annotation: Any, where: str) -> Any:
  """Turns sections into functions that build; all else stays as it is."""
  section, entry = section_of(annotation), _entry(annotation)
  if section and (value is None or _is(value, Mapping)):
    return functools.partial(make, section.factory, value or {}, where)
  if entry and _is(value, Sequence):
    return tuple(
      _built(each, entry, f"{where}[{i}]") for i, each in enumerate(value)
    )
  return value


def chosen(
  about: Section, section: Mapping[str, Any], where: str
) -> tuple[Factory, dict[str, inspect.Parameter]]:
  """Returns what builds a section, and the parameters that are its fields."""
  factory = about.factory
  if isinstance(factory, Mapping):
    factory = factory[known(section.get("kind", ""), factory, f"{where}.kind")]
  parameters = inspect.signature(factory).parameters
  # A linen module has a parent and a name, for which a config has no use.
  hidden = {*about.given, *(("name",) if "parent" in parameters else ())}
  return factory, {
    name: parameter
    for name, parameter in parameters.items()
    if name not in hidden and alternatives(parameter.annotation)
  }


# -- checking -----------------------------------------------------------------


class Alternative(NamedTuple):
  """One of the types that an annotation names.

  Attributes:
    kind: a key of `_KINDS`.
    about: what `Annotated` says of it: `Names`, `Range`, `Section`; or None.
    entry: annotation of the entries, of a list; or None.
    line: what the field is, where `Annotated` says that.
  """

  kind: type
  about: Any
  entry: Any
  line: str


def alternatives(annotation: Any) -> list[Alternative]:
  """Returns what an annotation names; nothing where no config can hold it."""
  union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
  found = []
  for each in typing.get_args(annotation) if union else (annotation,):
    noted = typing.get_origin(each) is Annotated
    plain, *notes = typing.get_args(each) if noted else (each,)
    about = next((n for n in notes if not isinstance(n, str)), None)
    line = next((n for n in notes if isinstance(n, str)), "")
    kind = typing.get_origin(plain) or plain
    if isinstance(about, Section):
      kind = Mapping
    entry = None
    if kind in (Sequence, Iterable):
      kind, entry = Sequence, (*typing.get_args(plain), Any)[0]
    if kind not in _KINDS:
      return []
    found.append(Alternative(kind, about, entry, line))
  return found


def section_of(annotation: Any) -> Section | None:
  """Returns the section that a field may be; None where it may not."""
  found = (each.about for each in alternatives(annotation))
  return next((about for about in found if isinstance(about, Section)), None)


def _entry(annotation: Any) -> Any:
  """Returns the annotation of a list's entries; None of what is no list."""
  found = (each.entry for each in alternatives(annotation))
  return next((entry for entry in found if entry), None)


def typed(value: Any, annotation: Any, where: str) -> None:
  """Lets no value pass that is not as annotated, where a config holds such.

  That is bool, int, float (an int will do), str, None, sections and lists, and
  a choice of these, as far as `Annotated` says with what is in them.

  Raises:
    ValueError: names the field, its value and what may be in its place.
  """
  each_kind = alternatives(annotation)
  found = next((each for each in each_kind if _is(value, each.kind)), None)
  if each_kind and found is None:
    raise ValueError(f"{where} is {value!r}; give it as {worded(annotation)}.")
  about, entry = found[1:3] if found else (None, None)
  if isinstance(about, Names):
    known(value, about.known, where)
  elif isinstance(about, Range):
    if not about.least <= value < about.below:
      raise ValueError(f"{where} is {value}; give {about}.")
  elif isinstance(about, Section):
    _check(value, about, where)
  elif entry:
    several = section_of(entry)
    for i, each in enumerate(value):
      typed(each, entry, f"{where}[{i}]" if several else where)
    bounded = any(isinstance(a.about, Range) for a in alternatives(entry))
    if bounded and not value:
      raise ValueError(f"{where} is {value}; give at least one.")


def _check(section: Mapping[str, Any], about: Section, where: str) -> None:
  """Lets no section pass in which a field is unknown, missing or unsound."""
  _, parameters = chosen(about, section, where)
  by_kind = isinstance(about.factory, Mapping)
  values = {n: v for n, v in section.items() if not (by_kind and n == "kind")}
  refuse_unknown(values, parameters, where)
  for name, parameter in parameters.items():
    if name in values:
      typed(values[name], parameter.annotation, f"{where}.{name}")
    elif parameter.default is parameter.empty:
      raise ValueError(f"{where}.{name} is missing; give it a value.")


def refuse_unknown(
  section: Mapping[str, Any], known: Iterable[str], where: str
) -> None:
  """Lets no field pass that nobody reads.

  Raises:
    ValueError: names the field, and the nearest that exists.
  """
  known = list(known)
  for name in section:
    if not known:
      raise ValueError(
        f"{where}.{name} does not exist, nor any other field there; take it"
        " out of the config."
      )
    if name not in known:
      raise ValueError(
        f"{where}.{name} does not exist; the nearest is"
        f" {where}.{nearest(name, known)}."
      )


def known(name: Any, names: Collection[str], where: str) -> str:
  """Returns the name, if it is one of these.

  Raises:
    ValueError: it is not; lists all names, and says which is the nearest.
  """
  if not isinstance(name, str) or name not in names:
    raise ValueError(
      f"{where} is {name!r}; choose one of {', '.join(map(repr, names))}"
      f" (the nearest is {nearest(name, names)!r})."
    )
  return name


def nearest(name: Any, known: Iterable[str]) -> str:
  """Returns which of the names is most like this one."""
  return difflib.get_close_matches(str(name), list(known), 1, 0)[0]


def _is(value: Any, kind: type) -> bool:
  if kind is Mapping:
    return hasattr(value, "keys")
  if kind is Sequence:
    return isinstance(value, (list, tuple))
  # By the type itself: True is an int otherwise.
  return type(value) is kind or (kind is float and type(value) is int)


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
  said = next((a.line for a in alternatives(annotation) if a.line), "")
  line = "; ".join(filter(None, (line, said)))
  yield Field(where, annotation, value, default, line)
  entry = _entry(annotation)
  if entry and section_of(entry) and _is(value, Sequence):
    for i, each in enumerate(value):
      yield from fields(entry, f"{where}[{i}]", each)
  about = section_of(annotation)
  if about is None:
    return
  section = value if _is(value, Mapping) else {}
  if kinds := isinstance(about.factory, Mapping):
    kind = section.get("kind", EMPTY)
    names = Annotated[str, Names(about.factory)]
    yield Field(f"{where}.kind", names, kind, EMPTY, "which of these it is")
    if kind is EMPTY:
      return
  factory, parameters = chosen(about, section, where)
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
def _lines(factory: Factory) -> dict[str, str]:
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


def worded(annotation: Any, fully: bool = False) -> str:
  """Writes what a field may hold: "int or None".

  Args:
    annotation: of the field.
    fully: whether with names, ranges, and what lists hold.
  """
  return " or ".join(_worded(a, fully) for a in alternatives(annotation))


def _worded(each: Alternative, fully: bool) -> str:
  word, about = _KINDS[each.kind], each.about
  if not fully:
    return word
  if each.entry and alternatives(each.entry):
    return f"{word} of ({worded(each.entry, fully)})"
  if isinstance(about, Names):
    return " | ".join(about.known)
  if isinstance(about, Range):
    return f"{word}, {about}"
  return word


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
  about = section_of(annotation)
  kinds = about and isinstance(about.factory, Mapping) and about.factory
  by_kind = {each.kind: each for each in alternatives(annotation)}
  for kind, reader in _READERS.items():
    if kind is Mapping and kinds and str(text).isidentifier():
      return {"kind": known(text, kinds, where)}
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
  wanted = worded(annotation)
  if about:
    begin = "'kind'" if kinds else repr(next(iter(chosen(about, {}, "")[1])))
    wanted += f", as in {{{begin}: ...}}"
  raise ReadError(f"--{where}={text} cannot be read; give it as {wanted}.")


def _within(value: Any, annotation: Any, where: str) -> Any:
  """Reads what is in a list or a section; leaves it to `typed` to refuse it."""
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
  if not _is(section, Mapping):
    raise TypeError
  fields = dict(section)
  try:
    _, parameters = chosen(each.about, fields, where)
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
  elif not _is(text, Sequence):
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
_KINDS = {
  **{kind: kind.__name__ for kind in (bool, int, float, str)},
  types.NoneType: "None",
  Mapping: "dict",
  Sequence: "list",
}
