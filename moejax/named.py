"""Objects by name: checked calls with the fields of a section of a config."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def choose(
  table: Mapping[str, Callable[..., Any]],
  section: Mapping[str, Any],
  where: str,
  **given: Any,
) -> Any:
  """Calls the entry that the section's `kind` names with its other fields."""
  fields = dict(section)
  kind = fields.pop("kind", "")
  return make(
    table[known(kind, table, f"{where}.kind")], fields, where, **given
  )


def make(
  factory: Callable[..., Any],
  section: Mapping[str, Any],
  where: str,
  **given: Any,
) -> Any:
  """Calls `factory` with a section's fields, checked by name."""
  parameters = inspect.signature(factory).parameters
  # Every linen module also takes these two; a config has no use for them.
  hidden = {"parent", "name", *given}
  fields = [name for name in parameters if name not in hidden]
  refuse_unknown(section, fields, where)
  for name in fields:
    needed = parameters[name].default is inspect.Parameter.empty
    if needed and name not in section:
      raise ValueError(f"{where}.{name} is missing; give it a value.")
  return factory(**section, **given)


def refuse_unknown(
  section: Mapping[str, Any], known: Iterable[str], where: str
) -> None:
  """Lets no field pass that nobody reads.

  Raises:
    ValueError: names the field, and the nearest that exists.
  """
  known = list(known)
  for name in section:
    if name not in known:
      raise ValueError(
        f"{where}.{name} does not exist; the nearest is"
        f" {where}.{_nearest(name, known)}."
      )


def known(name: str, table: Mapping[str, Any], where: str) -> str:
  """Returns the name, if the table has it.

  Raises:
    ValueError: it has not; lists all names, and says which is the nearest.
  """
  if name not in table:
    raise ValueError(
      f"{where} is {name!r}; choose one of {', '.join(map(repr, table))}"
      f" (the nearest is {_nearest(name, table)!r})."
    )
  return name


def sizes(where: str, **fields: int | Sequence[int] | None) -> None:
  """Lets no size pass that is not 1 or more; None is no size.

  Raises:
    ValueError: names the field and its value.
  """
  for name, value in fields.items():
    for size in value if isinstance(value, (list, tuple)) else (value,):
      if size is not None and size < 1:
        raise ValueError(f"{where}.{name} is {value}; give 1 or more.")


def _nearest(name: str, known: Iterable[str]) -> str:
  return difflib.get_close_matches(str(name), list(known), 1, 0)[0]
