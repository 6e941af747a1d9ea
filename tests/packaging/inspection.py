"""Print the public names, modules and signatures of the installed package as JSON.

Runs in the environments that the packaging tests create.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
from types import ModuleType

import aibind_postgres
from aibind_postgres import schema


def signatures(module: ModuleType) -> dict[str, str]:
    """Return the signatures of the functions of a module and of the methods of its classes."""
    found: dict[str, str] = {}
    for name, value in vars(module).items():
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value):
            functions = {f"{name}.{key}": item for key, item in vars(value).items() if inspect.isfunction(item)}
        else:
            functions = {name: value} if inspect.isfunction(value) else {}
        for key, function in functions.items():
            # Without the addresses of functions that are default values: they differ between processes.
            found[key] = re.sub(" at 0x[0-9a-f]+", "", str(inspect.signature(function)))
    return found


def modules() -> list[str]:
    """Return the names of the modules that need no extra."""
    walk = pkgutil.walk_packages(aibind_postgres.__path__, "aibind_postgres.")
    return sorted(
        module.name for module in walk if module.name.split(".")[1] not in ("cli", "contrib", "pytest_plugin")
    )


print(
    json.dumps(
        {
            "file": aibind_postgres.__file__,
            "modules": {name: signatures(importlib.import_module(name)) for name in modules()},
            "public": aibind_postgres.__all__,
            "schema": schema.render(notify_trigger=True),
        }
    )
)
