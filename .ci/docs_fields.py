"""
An extension of griffe, for the Python reference: the options that a config's fields are made of.

Griffe reads the source and does not run it. Of a field that is made by a function it knows the call, not the default,
and of a docstring not what a decorator adds.
"""

import enum
import importlib
import inspect
from dataclasses import MISSING, fields
from typing import Any

import griffe


class FieldHelp(griffe.Extension):
    """Gives configs the docstring and the defaults that they have when they are imported."""

    def on_class_members(self, *, cls: griffe.Class, **others: Any) -> None:
        """Renews a class that has the decorator `with_field_help`. Called by griffe."""
        if cls.docstring is None or "with_field_help" not in [str(decorator.value) for decorator in cls.decorators]:
            return
        config_class = getattr(importlib.import_module(cls.module.path), cls.name)
        cls.docstring.value = inspect.getdoc(config_class) or ""
        cls.members.pop("__post_init__", None)
        for field in fields(config_class):
            member = cls.members.get(field.name)
            if isinstance(member, griffe.Attribute) and field.default is not MISSING:
                member.value = repr(field.default.value if isinstance(field.default, enum.Enum) else field.default)
