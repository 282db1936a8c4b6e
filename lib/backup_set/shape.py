"""Whether values read from JSON have the shape that a dataclass's annotations give."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints


def misfit(kind: type[Any], raw: object) -> str | None:
    """The first field of `kind` that `raw` lacks or that holds something else; None where all fit.

    Keys beyond the fields are passed over: a later version may have added them.
    """
    if not isinstance(raw, Mapping):
        return kind.__name__
    hints = get_type_hints(kind)
    for one in dataclasses.fields(kind):
        if one.name not in raw:
            if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
                return one.name
        elif not _fits(raw[one.name], hints[one.name]):
            return one.name
    return None


def _fits(value: object, hint: Any) -> bool:
    if hint is Any:
        return True
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return misfit(hint, value) is None
    origin, inner = get_origin(hint), get_args(hint)
    if origin in {Union, types.UnionType}:
        return any(_fits(value, one) for one in inner)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(one, inner[1]) for one in value.values())
    if origin is list:
        return isinstance(value, list) and all(_fits(one, inner[0]) for one in value)
    return type(value) is hint  # JSON has no subclasses, and true is no number
