"""The `aibind-postgres` command, which needs the extra `cli`: `pip install 'aibind-postgres[cli]'`."""

import sys


def main() -> None:
    """Run the command and exit. Entry point of `aibind-postgres`."""
    try:
        from .app import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("rich", "typer"):
            raise
        print("aibind-postgres: the command needs an extra: pip install 'aibind-postgres[cli]'", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    run()
