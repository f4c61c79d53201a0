"""Settings: YAML, read with the safe loader into frozen typed classes; an unknown key is an error with a hint."""

import copy
import difflib
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo

from affekt.data.errors import SettingsError


class Settings(BaseModel):
    """Base of every settings class: frozen, keyword-only, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, values: Any) -> Any:
        """`true` would pass for 1, and nobody means that."""
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, bool) and name in cls.model_fields and not _may_be_true(cls.model_fields[name]):
                raise ValueError(f"{name} is {str(value).lower()}, which is no value of it; see --print-config")
        return values

    @classmethod
    def parse(cls, values: dict[str, Any], source: str = "settings") -> Self:
        """Validate nested `values`. Raises SettingsError that names `source`, the key, the value and the way out."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise SettingsError("\n".join(_explain(cls, item, source) for item in error.errors())) from None

    @classmethod
    def read(cls, path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Self:
        """Read a YAML file and apply `key.sub=value` overrides, whose values are YAML too."""
        return cls.parse(apply_overrides(read_yaml(path), overrides), str(path))

    @classmethod
    def parse_saved(cls, values: dict[str, Any], source: str) -> Self:
        """As `parse`, for what a file format of the same major version holds: keys unknown here, which a newer affekt
        added, are left out, and keys that came later have their defaults."""
        values = copy.deepcopy(values)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            for *parents, last in (item["loc"] for item in error.errors() if item["type"] == "extra_forbidden"):
                node = values
                for parent in parents:
                    node = node[parent]
                del node[last]
        return cls.parse(values, source)

    def to_yaml(self) -> str:
        """All resolved values; reading them back gives an equal object."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def explained(self, indent: str = "") -> str:
        """As `to_yaml`, one setting a line, with the description of each as a comment."""
        lines, values = [], self.model_dump(mode="json")
        for name, about in type(self).model_fields.items():
            note = f"   # {about.description}" if about.description else ""
            inner = getattr(self, name)
            if isinstance(inner, Settings):
                lines.append(f"{indent}{name}:{note}\n{inner.explained(indent + '  ')}")
            else:
                line = yaml.safe_dump({name: values[name]}, allow_unicode=True, default_flow_style=True, width=10**6)
                lines.append(f"{indent}{line.strip()[1:-1]}{note}\n")
        return "".join(lines)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds one mapping. Raises SettingsError with file and line where it does not parse."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    return values


def apply_overrides(values: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """A copy of `values` with each `key.sub=value` set; values are parsed as YAML: `0.1`, `true`, `[1, 2]`."""
    values = {**values}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise SettingsError(f"`{item}` is not of the form key.sub=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise SettingsError(f"`{item}`: the value is not valid YAML: {error}") from None
        *parents, last = key.split(".")
        node = values
        for parent in parents:
            node[parent] = {**node[parent]} if isinstance(node.get(parent), dict) else {}
            node = node[parent]
        node[last] = value
    return values


def _explain(cls: type[BaseModel], item: dict[str, Any], source: str) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "value_error":  # of our own, which says what was found
        return f"{source}: {key + ': ' if key else ''}{item['msg'].removeprefix('Value error, ')}"
    if item["type"] != "extra_forbidden":
        return f"{source}: {key}: {item['msg']} (found {item['input']!r})"
    known = list(_fields_at(cls, item["loc"][:-1]))
    near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(known)}"
    return f"{source}: unknown setting `{key}`; {hint}"


def _may_be_true(field: FieldInfo) -> bool:
    return bool in (field.annotation, *getattr(field.annotation, "__args__", ()))


def _fields_at(cls: type[BaseModel], path: tuple[Any, ...]) -> dict[str, Any]:
    fields = cls.model_fields
    for part in (part for part in path if not isinstance(part, int)):  # a number is a place in a list
        field = fields.get(str(part))
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        nested = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if nested is None:
            return {}
        fields = nested.model_fields
    return fields
