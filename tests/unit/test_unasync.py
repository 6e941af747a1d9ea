"""The conversion to the synchronous flavour: output, check, and refused sources."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "unasync.py"
CONVERTER = runpy.run_path(str(SCRIPT))
convert, outdated = CONVERTER["convert"], CONVERTER["outdated"]

SOURCE = '''"""Read."""

class AsyncReader:
    async def read(self) -> str:
        async with self.line as line:
            return f"{len([part async for part in line])}" + await line.rest()
'''

CONVERTED = '''# Generated from _async/reader.py: edit that file.
"""Read."""

class Reader:
    def read(self) -> str:
        with self.line as line:
            return f"{len([part for part in line])}" + line.rest()
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path / "package")


def written(folder: Path, source: str = SOURCE, name: str = "reader.py") -> Path:
    file = folder / "_async" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source, "utf-8")
    return folder


def test_conversion_renames_tokens_and_adds_a_header(folder: Path) -> None:
    if sys.version_info < (3, 12):  # an f-string is one token
        written(folder, SOURCE.replace("part async for", "part for"))
    convert([folder])
    assert (folder / "_sync" / "reader.py").read_text("utf-8") == CONVERTED


def test_repeated_conversion(folder: Path) -> None:
    convert([folder])
    convert([folder])
    assert (folder / "_sync" / "reader.py").read_text("utf-8").count("# Generated") == 1
    assert outdated([folder]) == []


def test_nested_packages(folder: Path) -> None:
    written(folder, "class AsyncReader: ...  # …\n", "inner/deep/reader.py")
    convert([folder])
    text = (folder / "_sync" / "inner" / "deep" / "reader.py").read_text("utf-8")
    assert text == "# Generated from _async/inner/deep/reader.py: edit that file.\nclass Reader: ...  # …\n"


def test_parent_folder_named_like_a_flavour(tmp_path: Path) -> None:
    folder = written(tmp_path / "_async" / "_sync" / "_async" / "package")
    convert([folder])
    assert [file.relative_to(folder) for file in outdated([folder])] == []
    assert (folder / "_sync" / "reader.py").exists()


def test_several_folders(folder: Path, tmp_path: Path) -> None:
    other = written(tmp_path / "tests", "import pytest\n", "test_reader.py")
    convert([folder, other])
    assert (other / "_sync" / "test_reader.py").exists()
    assert outdated([folder, other]) == []


def test_surplus_files_are_removed(folder: Path) -> None:
    (folder / "_sync").mkdir()
    (folder / "_sync" / "surplus.py").touch()
    (folder / "_sync" / "data.txt").touch()
    convert([folder])
    assert [file.name for file in (folder / "_sync").iterdir()] == ["reader.py"]


def test_outdated_files(folder: Path) -> None:
    target = folder / "_sync" / "reader.py"
    assert outdated([folder]) == [target]  # missing
    convert([folder])
    assert outdated([folder]) == []
    target.write_text(target.read_text("utf-8") + "# edited\n", "utf-8")
    assert outdated([folder]) == [target]
    convert([folder])
    (folder / "_sync" / "surplus.py").touch()
    assert outdated([folder]) == [folder / "_sync" / "surplus.py"]
    convert([folder])
    written(folder, SOURCE.replace("Read.", "Read it."))
    assert outdated([folder]) == [target]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ('class AsyncReader:\n    """An AsyncReader."""\n', "reader.py:2: the string contains AsyncReader, which"),
        ('name = "AsyncReader"\n', "reader.py:1: the string contains AsyncReader, which"),
        ('text = f"{AsyncReader()}"\n', "reader.py:1: AsyncReader inside an f-string"),
        ('async def f(x):\n    return f"{await x}"\n', "reader.py:2: await inside an f-string"),
        ('text = f"{async_read()}"\n', "reader.py:1: async_read inside an f-string"),
        (
            "from contextlib import asynccontextmanager as made\nname = 'asynccontextmanager'\n",
            "reader.py:2: the string contains asynccontextmanager",
        ),
    ],
)
def test_refused_source_writes_nothing(folder: Path, source: str, message: str) -> None:
    convert([folder])
    before = (folder / "_sync" / "reader.py").read_text("utf-8")
    written(folder, source)
    with pytest.raises(SystemExit, match=message):
        convert([folder])
    assert (folder / "_sync" / "reader.py").read_text("utf-8") == before


@pytest.mark.parametrize(
    ("name", "converted"),
    [
        ("AsyncReader", "Reader"),
        ("async_read", "read"),
        ("_async", "_sync"),
        ("asynccontextmanager", "contextmanager"),
        ("AbstractAsyncContextManager", "AbstractContextManager"),
        ("asyncpg", "asyncpg"),
        ("Asynchronous", "Asynchronous"),
        ("wrap_async_x", "wrap_async_x"),
    ],
)
def test_rules_and_exceptions(name: str, converted: str) -> None:
    assert CONVERTER["convert_name"](name) == converted


def test_exit_codes_of_the_command(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts")
    package = tmp_path / "src" / "aibind_postgres"
    written(package, SOURCE)
    written(tmp_path / "tests", "", "test_reader.py")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, tmp_path / "scripts" / "unasync.py", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert run("--check").returncode == 1
    assert run().returncode == 0
    assert run("--check").returncode == 0
    (package / "_sync" / "reader.py").unlink()
    missing = run("--check")
    assert missing.returncode == 1
    assert "src/aibind_postgres/_sync/reader.py" in missing.stderr
    assert not (package / "_sync" / "reader.py").exists()
    assert run("--chek").returncode == 1
