"""Plain values to dataclasses: every key and every value is checked against the dataclass's annotations.

An error names the key, the value that was given, the value that is wanted and the nearest known key. ``train.config``
has the dataclasses of a training run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import reprlib
import types
import typing
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

ALIASES = 20  # the most aliases in one YAML text


class ConfigError(ValueError):
    """A configuration that is refused. The message says what was given, what was wanted and what to do."""


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number, for ``Annotated``. ``least`` and ``most`` are allowed themselves, the other two are not."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def refusal(self, value: float) -> str | None:
        """Which numbers are wanted, if the value is out of range."""
        if value < self.least:
            return f"at least {self.least} wanted"
        if value > self.most:
            return f"at most {self.most} wanted"
        if value <= self.above:
            return f"a number above {self.above} wanted"
        return f"a number below {self.below} wanted" if value >= self.below else None


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: if the text is not YAML, is nested too deeply, or has more than ``ALIASES`` aliases. A small text
            with many aliases stands for an endless value.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        aliases = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                self.aliases += 1
                if self.aliases > ALIASES:
                    raise ValueError(f"it has more than {ALIASES} aliases (*name); write the values out")
            return super().compose_node(parent, index)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def set_value(values: dict[str, Any], key: str, value: Any) -> None:
    """Set ``values["a"]["b"]`` for the key ``a.b``. Missing levels are added."""
    *path, last = key.split(".")
    here = values
    for name in path:
        if here.get(name) is None:
            here[name] = {}
        here = here[name]
        if not isinstance(here, dict):
            raise ConfigError(f"override {key}: {name} is {here!r}, which has no keys")
    here[last] = value


def build(cls: Any, values: Any, where: str = "") -> Any:
    """A dataclass from plain values. Missing keys take their defaults.

    A field whose metadata has ``keys_of``, another dataclass, takes all keys that are not fields, as a dict. They are
    checked against that dataclass and not completed.

    Raises:
        ConfigError: for an unknown key, and for a value of a wrong type or out of range.
    """
    values = _mapping(values, where)
    fields = dataclasses.fields(cls)
    own = {field.name for field in fields if "keys_of" not in field.metadata}
    given: dict[str, Any] = {}
    for field in fields:
        if "keys_of" in field.metadata:
            extra = {key: values.pop(key) for key in list(values) if key not in own}
            given[field.name] = _check_keys((field.metadata["keys_of"],), extra, where, partial=True, also=own)
    return cls(**given, **_check_keys((cls,), values, where))


def _check_keys(
    classes: tuple[Any, ...], values: Any, where: str, *, partial: bool = False, also: Collection[str] = ()
) -> dict[str, Any]:
    """The values as the annotations of a dataclass want them, or those of several of which one is meant.

    ``partial``: nested dataclasses stay dicts of the given keys. ``also``: keys that the hint of an unknown key may
    name, too.
    """
    hints: dict[str, Any] = {}
    for cls in classes:
        annotations = typing.get_type_hints(cls, include_extras=True)
        hints |= {field.name: annotations[field.name] for field in dataclasses.fields(cls)}
    found = {}
    for key, value in _mapping(values, where).items():
        name = f"{where}.{key}" if where else str(key)
        if key not in hints:
            known = [*hints, *also]
            near = difflib.get_close_matches(str(key), known, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            raise ConfigError(f"{name}: unknown key; {hint}")
        nested = typing.get_args(hints[key]) or (hints[key],)
        if partial and all(map(dataclasses.is_dataclass, nested)):
            found[key] = _check_keys(nested, value, name, partial=True)
        else:
            found[key] = _convert(value, hints[key], name)
    return found


def _mapping(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or 'the configuration'} is {reprlib.repr(values)}; keys and values wanted")
    return dict(values)


def _convert(value: Any, hint: Any, name: str) -> Any:
    """The value as the annotation wants it. Whole numbers pass as floats and lists as tuples; nothing else is bent."""
    if dataclasses.is_dataclass(hint):
        return build(hint, value, name)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        value = _convert(value, inner[0], name)
        for bounds in inner[1:]:
            if refusal := bounds.refusal(value):
                raise ConfigError(f"{name} is {value}; {refusal}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        (hint,) = (part for part in inner if part is not type(None))
        try:
            return _convert(value, hint, name)
        except ConfigError as error:
            raise ConfigError(f"{error}, or null") from error
    shown = reprlib.repr(value)
    if origin is Literal:
        if value in inner and isinstance(value, str):
            return value
        near = difflib.get_close_matches(shown.strip("'"), inner, 1)
        raise ConfigError(
            f"{name} is {shown}; one of {', '.join(inner)} wanted" + (f" (near: {near[0]})" if near else "")
        )
    if origin is tuple:
        many = len(inner) == 2 and inner[1] is Ellipsis
        if isinstance(value, (list, tuple)) and (many or len(value) == len(inner)):
            kinds = [inner[0]] * len(value) if many else inner
            return tuple(_convert(item, kind, name) for item, kind in zip(value, kinds, strict=True))
        raise ConfigError(f"{name} is {shown}; a list of {'' if many else f'{len(inner)} '}numbers wanted")
    if hint is float and not isinstance(value, bool):
        number: float | None = None
        if isinstance(value, (int, float)):
            number = float(value)
        elif isinstance(value, str):  # YAML 1.1 reads 8e-6, which has no point, as a string
            with contextlib.suppress(ValueError):
                number = float(value)
        if number is not None and math.isfinite(number):
            return number
    elif isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    wanted = {float: "a number", int: "a whole number", bool: "true or false", str: "a string"}.get(hint, str(hint))
    raise ConfigError(f"{name} is {shown} ({type(value).__name__}); {wanted} wanted")
