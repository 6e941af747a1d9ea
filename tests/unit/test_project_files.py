"""The project files are consistent: classifiers, nox sessions, the CI workflow, versions and links."""

from __future__ import annotations

import hashlib
import json
import re
import runpy
from pathlib import Path
from typing import Any

import nox
import pytest
import yaml
from support import servers

ROOT = Path(__file__).parents[2]
PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
PROJECT = PYPROJECT["project"]
WORKFLOW = (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8")
RELEASE = (ROOT / ".github" / "workflows" / "release.yml").read_text("utf-8")


def lists_of(name: str) -> list[list[str]]:
    """Return the values of each line `name: [...]` of the workflow."""
    return [json.loads(values) for values in re.findall(rf"^ +{name}: (\[.*\])$", WORKFLOW, re.MULTILINE)]


@pytest.fixture(scope="module")
def noxfile() -> dict[str, Any]:
    """The variables of noxfile.py. Nox warns if the file runs twice in a process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return runpy.run_path("noxfile.py")


def test_python_versions(noxfile: dict[str, Any]) -> None:
    prefix = "Programming Language :: Python :: "
    versions = [line.removeprefix(prefix) for line in PROJECT["classifiers"] if line.startswith(prefix)]
    assert lists_of("python") == [versions]
    assert noxfile["PYTHONS"] == versions
    assert PROJECT["requires-python"] == f">={versions[0]}"


def test_postgres_versions(noxfile: dict[str, Any]) -> None:
    assert lists_of("postgres") == [noxfile["POSTGRES"]]
    installed, with_partitions = re.findall(r"contains\(fromJSON\('(\[.*?\])'\), matrix\.postgres\)", WORKFLOW)
    assert json.loads(installed) == list(noxfile["SYSTEM_SERVERS"])
    tested = re.findall(r'@nox.parametrize\("postgres", (\[.*\])\)', (ROOT / "noxfile.py").read_text("utf-8"))
    assert [json.loads(with_partitions)] == [json.loads(versions) for versions in tested]
    assert sorted([*noxfile["SYSTEM_SERVERS"], *servers.EMBEDDED_VERSIONS]) == noxfile["POSTGRES"]


def test_workflow_runs_sessions_of_nox(noxfile: dict[str, Any]) -> None:
    [sessions] = lists_of("session")
    functions = [noxfile[name.replace("-", "_")] for name in sessions]
    assert [function.__name__.replace("_", "-") for function in functions] == sessions
    commands = re.findall(r"^ +- run: nox (.*)$", WORKFLOW, re.MULTILINE)
    assert [re.sub(r"\$\{\{.*?\}\}", "X", command.split("-s ")[1]) for command in commands] == [
        '"X"',
        "\"tests-X(postgres='X')\"",
    ]


def test_each_folder_of_tests_is_run() -> None:
    folders = {path.relative_to(ROOT).parts[1] for path in (ROOT / "tests").glob("*/**/test_*.py")}
    options = PYPROJECT["tool"]["pytest"]["ini_options"]
    by_pytest = {Path(path).name for path in options["testpaths"]}
    steps = " ".join(re.findall(r"^pytest (.*?)(?:  #.*)?$", (ROOT / ".ci" / "run").read_text("utf-8"), re.MULTILINE))
    assert folders - by_pytest == set(re.findall(r"tests/(\w+)(?= |$)", steps))
    # `pytest tests` runs all folders without a session of their own.
    assert folders - set(options["norecursedirs"]) == by_pytest | {"contrib"}


def test_release_workflow() -> None:
    assert re.findall(r"nox -s (\w+)", RELEASE) == ["docs", "release"]
    assert "secrets." not in RELEASE
    guide = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("\n## To release\n")[2].partition("\n## ")[0]
    assert {"`release.yml`", "environment `pypi`"} <= set(re.findall(r"`release.yml`|environment `pypi`", guide))
    assert re.search(r"^      name: pypi$", RELEASE, re.MULTILINE)


def test_actions_of_the_release_are_commits() -> None:
    # The job that publishes may get a token of PyPI: a tag or a branch of an action can be moved to other code.
    actions = re.findall(r"uses: (.*)", RELEASE)
    assert len(actions) == 5
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+\b.*", action) for action in actions)


@pytest.mark.parametrize("workflow", [WORKFLOW, RELEASE], ids=["ci", "release"])
def test_names_of_branches_and_tags_are_no_part_of_commands(workflow: str) -> None:
    steps = [step for job in yaml.safe_load(workflow)["jobs"].values() for step in job["steps"]]
    commands = [step["run"] for step in steps if "run" in step]
    assert commands
    assert not [command for command in commands if "${{ github." in command]


def test_actions_are_pinned() -> None:
    actions = re.findall(r"uses: (\S+)", WORKFLOW)
    assert len(actions) == 4
    assert all(re.fullmatch(r"[\w/-]+@v\d+", action) for action in actions)


def test_changelog_begins_with_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.findall(r"^## (\S+)", changelog, re.MULTILINE)[0] == PROJECT["version"]


def test_pre_commit_installs_the_requirements_of_the_build() -> None:
    config = (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    [requirements] = re.findall(r"additional_dependencies: \[(.*)\]", config)
    assert set(requirements.split(", ")) < set(PYPROJECT["build-system"]["requires"])


def test_urls_have_one_root() -> None:
    root = PROJECT["urls"]["Homepage"]
    assert all(url.startswith(root) for url in PROJECT["urls"].values())
    assert f"{root}/security" in (ROOT / "SECURITY.md").read_text("utf-8")
    for url in PROJECT["urls"].values():
        if path := re.fullmatch(rf"{re.escape(root)}/(?:tree|blob)/main/(.+)", url):
            assert (ROOT / path[1]).exists()


def test_vendored_files_are_those_of_the_table() -> None:
    folder = ROOT / "examples" / "shared" / "page" / "vendor"
    listed = dict(
        re.findall(r"^\| `(\S+)` \|.*`([0-9a-f]{64})` \|$", (folder / "README.md").read_text("utf-8"), re.MULTILINE)
    )
    code = [path for path in folder.iterdir() if path.suffix in (".js", ".mjs")]
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in code} == listed
    for path, version in re.findall(
        r"^\| `(\S+)` \|[^|]*\| ([\d.]+) \|", (folder / "README.md").read_text("utf-8"), re.MULTILINE
    ):
        assert re.search(rf"(marked v|DOMPurify ){re.escape(version)} ", (folder / path).read_text("utf-8")[:200])


def test_modules_of_the_page_are_small() -> None:
    for path in (ROOT / "examples" / "shared" / "page").glob("*.*"):
        assert len(path.read_text("utf-8").splitlines()) < 400, path.name
