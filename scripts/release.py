"""Build the sdist and the wheel, and try the wheel as a new user does: the demo, and the quick start of the site.

    python scripts/release.py [--tag v1.2.3] [FOLDER]

The packages are written to FOLDER, `dist` by default. With a tag, its version must be that of pyproject.toml, and the
changelog must have a dated section of it. Needs `build` and `twine`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 60  # seconds until a server must accept connections

# A server for the quick start, which otherwise begins with Docker. It runs until its input ends.
SERVER = """
import sys
from aibind_postgres import embedded
with embedded.server() as dsn:
    print(dsn, flush=True)
    sys.stdin.read()
"""


def step(text: str) -> None:
    print(f"\n==> {text}", flush=True)


def run(*command: str | Path, cwd: Path, env: dict[str, str]) -> None:
    print("$", *command, flush=True)
    subprocess.run(command, cwd=cwd, env=env, check=True)


def check_versions(tag: str | None) -> str:
    """Return the version of pyproject.toml. Exit if the tag or the changelog differ from it."""
    version: str = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)[0]
    section = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)[0]
    if tag is not None:
        if tag != f"v{version}":
            sys.exit(f"the tag is {tag}, but the version in pyproject.toml is {version}")
        if not re.fullmatch(rf"{re.escape(version)} \(\d{{4}}-\d\d-\d\d\)", section):
            sys.exit(f"CHANGELOG.md begins with '{section}': write '{version} (YYYY-MM-DD)'")
    return version


def build(folder: Path) -> Path:
    """Build the packages into an empty folder. Return the wheel."""
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} is not empty: an older package in it would be published as well")
    run(sys.executable, "-m", "build", "--outdir", folder, cwd=ROOT, env=dict(os.environ))
    run(sys.executable, "-m", "twine", "check", "--strict", *sorted(folder.iterdir()), cwd=ROOT, env=dict(os.environ))
    [wheel] = folder.glob("*.whl")
    return wheel


def clean_environment(scratch: Path, wheel: Path, extras: str, *others: str) -> dict[str, str]:
    """Install the wheel in a new environment. Return the variables with which its programs run."""
    venv.create(scratch / "venv", with_pip=True, symlinks=True, clear=True)
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PG"))}
    variables.pop("DATABASE_URL", None)
    variables |= {"PATH": f"{scratch / 'venv' / 'bin'}:{os.environ['PATH']}", "HOME": str(scratch)}
    run("python", "-m", "pip", "install", "--quiet", f"{wheel}[{extras}]", *others, cwd=scratch, env=variables)
    return variables


@contextmanager
def process(*command: str, cwd: Path, env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Run a program while the block runs."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=cwd, env=env, stdin=pipe, stdout=pipe, text=True) as program:
        try:
            yield program
        finally:
            program.terminate()


def quick_start(scratch: Path, variables: dict[str, str]) -> None:
    """Serve the application for FastAPI of docs/quickstart.md, and read, resume and stop an answer."""
    page = (ROOT / "docs" / "quickstart.md").read_text("utf-8")
    application = re.findall(r"^```python\n(.*?)^```", page.partition("### FastAPI")[2], re.MULTILINE | re.DOTALL)[0]
    (scratch / "main.py").write_text(application, "utf-8")
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    with process("python", "-c", SERVER, cwd=scratch, env=variables) as server:
        assert server.stdout is not None
        variables = {**variables, "DATABASE_URL": server.stdout.readline().strip()}
        run("aibind-postgres", "migrate", cwd=scratch, env=variables)
        with process("python", "-m", "uvicorn", "main:app", "--port", port, cwd=scratch, env=variables):
            url = f"http://127.0.0.1:{port}/__aibind__/stream"
            answer = post(url, {"prompt": "Hello"})
            stream_id = re.findall(r"^event: stream-id\nid: .*\ndata: (.*)$", answer, re.MULTILINE)[0]
            with urlopen(f"{url}/resume?id={stream_id}&after=2", timeout=TIMEOUT) as response:
                resumed = response.read().decode()
            stopped = post(f"{url}/stop", {"id": stream_id})
        server.communicate("")
    print(answer, resumed, stopped, sep="\n", flush=True)
    assert "data: You" in answer
    assert "data: You" not in resumed
    assert "event: done" in resumed


def post(url: str, body: dict[str, str]) -> str:
    """Send JSON as soon as the server accepts connections. Return the response."""
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            with urlopen(request, timeout=TIMEOUT) as response:
                text: str = response.read().decode()
                return text
        except URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError) or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tag", help="the tag of the release")
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "dist", help="for the packages")
    arguments = parser.parse_args()
    version = check_versions(arguments.tag)
    step(f"build {version}")
    wheel = build(arguments.folder.resolve())
    with tempfile.TemporaryDirectory(prefix="aibind-release-") as folder:
        scratch = Path(folder)
        step("install the wheel in an empty environment")
        variables = clean_environment(scratch, wheel, "cli,embedded")
        step("demo")
        run("aibind-postgres", "--version", cwd=scratch, env=variables)
        run("aibind-postgres", "demo", cwd=scratch, env=variables)
        step("quick start")
        variables = clean_environment(scratch, wheel, "cli,embedded,fastapi", "uvicorn")
        quick_start(scratch, variables)
    step(f"{version} is ready")


if __name__ == "__main__":
    main()
