"""Both flavours have the same modules, names, signatures and docstrings."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import aibind_postgres
from aibind_postgres import _async, _sync, schema

convert_name = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "unasync.py"))["convert_name"]
WORD = re.compile(r"\w+")


def renamed(text: str) -> str:
    return WORD.sub(lambda match: convert_name(match[0]), text)


def names_of_modules(package: ModuleType) -> set[str]:
    return {module.name for module in pkgutil.walk_packages(package.__path__)}


NAMES = sorted(names_of_modules(_async))
PUBLIC_PAIRS = [
    (name, name.removeprefix("Async")) for name in sorted(aibind_postgres.__all__) if name.startswith("Async")
]


def functions(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """Return the functions that a module defines, and the methods of its classes."""
    own = {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    found = {name: value for name, value in own.items() if inspect.isfunction(value)}
    for name, kind in own.items():
        if inspect.isclass(kind):
            methods = {key: value for key, value in vars(kind).items() if inspect.isfunction(value)}
            # Not those that NamedTuple has added.
            found |= {f"{name}.{key}": each for key, each in methods.items() if each.__module__ == module.__name__}
    return found


@pytest.fixture(params=NAMES)
def pair(request: pytest.FixtureRequest) -> tuple[ModuleType, ModuleType]:
    return tuple(importlib.import_module(f"{package.__name__}.{request.param}") for package in (_async, _sync))


def test_modules() -> None:
    assert names_of_modules(_sync) == set(NAMES)
    assert len(NAMES) >= 3


def test_names(pair: tuple[ModuleType, ModuleType]) -> None:
    ours, twins = pair
    assert {renamed(name) for name in vars(ours)} == set(vars(twins))


def test_signatures(pair: tuple[ModuleType, ModuleType]) -> None:
    ours, twins = map(functions, pair)
    expected = {renamed(name): renamed(str(inspect.signature(function))) for name, function in ours.items()}
    assert expected == {name: str(inspect.signature(function)) for name, function in twins.items()}


def test_docstrings(pair: tuple[ModuleType, ModuleType]) -> None:
    ours, twins = map(functions, pair)
    assert {renamed(name): function.__doc__ for name, function in ours.items()} == {
        name: function.__doc__ for name, function in twins.items()
    }
    assert pair[0].__doc__ == pair[1].__doc__
    for name, value in vars(pair[0]).items():
        if inspect.isclass(value) and value.__module__ == pair[0].__name__:
            assert value.__doc__ == getattr(pair[1], renamed(name)).__doc__


def test_coroutines_became_functions(pair: tuple[ModuleType, ModuleType]) -> None:
    async_functions, sync_functions = map(functions, pair)
    for name, function in async_functions.items():
        converted = sync_functions[renamed(name)]
        assert not inspect.iscoroutinefunction(converted)
        assert not inspect.isasyncgenfunction(converted)
        assert inspect.isgeneratorfunction(converted) == (
            inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function)
        )


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    return [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]


def test_public_classes_are_paired() -> None:
    assert {plain for _, plain in PUBLIC_PAIRS} <= set(aibind_postgres.__all__)
    assert ("AsyncPostgresStreamStore", "PostgresStreamStore") in PUBLIC_PAIRS


@pytest.mark.parametrize(("name", "plain"), PUBLIC_PAIRS)
def test_public_methods(name: str, plain: str) -> None:
    async_methods, sync_methods = (
        {
            key: parameters(value)
            for key, value in inspect.getmembers(getattr(aibind_postgres, public), inspect.isfunction)
            if key == "__init__" or not key.startswith("_")
        }
        for public in (name, plain)
    )
    assert async_methods == sync_methods


def test_schema_functions_are_paired() -> None:
    assert inspect.iscoroutinefunction(schema.async_migrate)
    assert parameters(schema.async_migrate) == parameters(schema.migrate)


def test_public_names_have_docstrings() -> None:
    undocumented = []
    for name in aibind_postgres.__all__:
        value = getattr(aibind_postgres, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            members = {f"{name}.{key}": item for key, item in inspect.getmembers(value, inspect.isfunction)}
            public = {key: item for key, item in members.items() if not key.rpartition(".")[2].startswith("_")}
            undocumented += [key for key, item in {name: value, **public}.items() if not item.__doc__]
    assert undocumented == []
