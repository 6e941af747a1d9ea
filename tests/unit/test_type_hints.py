"""`typing.get_type_hints` works for every public class, method and function."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import typing
from collections.abc import Iterator
from typing import Any

import pytest

import aibind_postgres

SKIPPED = {"examples", "cli"}
APP = "aibind_postgres.contrib.django."
NEED_SETTINGS = tuple(APP + name for name in ("admin", "models", "migrations"))  # of Django


def public_modules() -> Iterator[str]:
    """Yield the names of the public modules; those of `contrib` need the packages of their extras."""
    yield "aibind_postgres"
    for module in pkgutil.walk_packages(aibind_postgres.__path__, "aibind_postgres."):
        parts = module.name.split(".")
        if (
            not any(part.startswith("_") for part in parts)
            and parts[1] not in SKIPPED
            and not module.name.startswith(NEED_SETTINGS)
        ):
            yield module.name


def annotated(value: Any) -> Iterator[Any]:
    """Yield a class or function, and the methods and properties of a class, those of its bases included."""
    yield value
    if inspect.isclass(value):
        for kind in value.__mro__:
            if kind.__module__.startswith("aibind_postgres"):
                for member in vars(kind).values():
                    function = getattr(member, "fget", None) or inspect.unwrap(getattr(member, "__func__", member))
                    if inspect.isfunction(function) and function.__module__.startswith("aibind_postgres"):
                        yield function


def test_public_modules_are_found() -> None:
    assert {"aibind_postgres.schema", "aibind_postgres.contrib.flask", "aibind_postgres.sse"} <= set(public_modules())


@pytest.mark.parametrize("name", sorted(public_modules()))
def test_type_hints_of_public_names(name: str) -> None:
    module = importlib.import_module(name)
    own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == name]
    for key in getattr(module, "__all__", own):
        for each in annotated(getattr(module, key)):
            if inspect.isclass(each) or inspect.isfunction(each):
                typing.get_type_hints(each)
