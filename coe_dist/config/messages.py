"""One line for what is wrong with a configuration: the field, its value and what is allowed."""

from __future__ import annotations

import difflib
import re
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


class _RefusedError(ValueError):
    """A cross-field rule was broken; the message is already complete."""


def refused(field: str, value: object, allowed: str) -> _RefusedError:
    return _RefusedError(f"{field}: {value} is not allowed; {allowed}")


def describe(error: ValidationError, schema: type[BaseModel]) -> str:
    """One line for the first problem pydantic found: field, value, what is allowed."""
    first = error.errors()[0]
    location, kind, value = first["loc"], first["type"], first["input"]
    context = first.get("ctx", {})
    if location[-1:] == ("[key]",) or kind == "invalid_key":
        where = ".".join(map(str, location[:-2])) or "configuration"
        return f"{where}: key {value!r} is not allowed; give text as keys"
    if "options" in location:
        location = location[: location.index("options") + 2]  # what follows names a member of the union of types
    field = ".".join(map(str, location)) or "configuration"
    if kind == "value_error":
        cause = context.get("error")
        return str(cause) if isinstance(cause, _RefusedError) else f"{field}: {cause}"
    if kind == "extra_forbidden":
        keys = _allowed_keys(schema, location)
        close = difflib.get_close_matches(str(location[-1]), keys, n=1)
        return f"{field}: unknown key; allowed here: {', '.join(keys)}" + (
            f"; did you mean {close[0]}?" if close else ""
        )
    if kind == "missing":
        return f"{field}: missing; it must be given"
    return f"{field}: {value!r} is not allowed; give {_allowed(schema, location, kind, context, first['msg'])}"


def _allowed_keys(schema: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    section = schema
    for part in location[:-1]:
        if str(part) not in section.model_fields:  # a key of `dict[str, Section]`
            continue
        annotation = section.model_fields[str(part)].annotation
        # of `Section | None` and of `dict[str, Section]`
        for member in (annotation, *get_args(annotation)):
            if isinstance(member, type) and issubclass(member, BaseModel):
                section = member
                break
    return list(section.model_fields)


def _allowed(
    schema: type[BaseModel], location: tuple[int | str, ...], kind: str, context: dict[str, Any], message: str
) -> str:
    if kind == "literal_error":
        return str(context["expected"]).replace("'", "")
    if kind == "string_pattern_mismatch":
        more = re.search(r"\{0,(\d+)\}", str(context["pattern"]))  # than the first character
        longest = 1 + int(more[1]) if more else 1
        return f"up to {longest} letters, digits, '.', '_' or '-', starting with a letter or digit"
    if "options" in location[:-1]:
        return "a finite number, text, true or false, or a list of whole numbers"
    if kind in ("dict_type", "model_type"):
        return "a mapping of keys"
    bounds, whole = _bounds(schema, location)
    if bounds:
        return f"{'a whole number' if whole else 'a number'} {bounds}"
    return {"string_type": "text", "bool_type": "true or false"}.get(kind, message.removeprefix("Input should be "))


def _bounds(of: type[BaseModel], location: tuple[int | str, ...]) -> tuple[str, bool]:
    """The range that a numeric field's schema allows, in words, and whether it takes whole numbers."""
    schema: dict[str, Any] = of.model_json_schema()
    node: dict[str, Any] = schema
    for part in location:
        properties = node.get("properties", {})
        if str(part) not in properties:
            return "", False
        node = properties[str(part)]
        options = node.get("anyOf", [node])
        node = next((o for o in options if o.get("type") != "null"), node)
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    low, high = node.get("minimum"), node.get("maximum")
    above, below = node.get("exclusiveMinimum"), node.get("exclusiveMaximum")
    whole = node.get("type") == "integer"
    if low is not None and high is not None:
        return f"from {low} to {high}", whole
    at_least = "of at least" if below is None else "from"
    bounds = ((at_least, low), ("above", above), ("at most", high), ("below", below))
    return ", ".join(f"{words} {bound}" for words, bound in bounds if bound is not None), whole
