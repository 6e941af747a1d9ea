"""The build hook: generates the synchronous flavour for each wheel, sdist and editable install."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class UnasyncHook(BuildHookInterface):  # type: ignore[type-arg]  # generic only in hatchling's stubs
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        runpy.run_path(str(Path(self.root, "scripts", "unasync.py")), run_name="scripts.unasync")["convert"]()
