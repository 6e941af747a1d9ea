"""The command `doctor`: print findings about a database, each with its remedy."""

from __future__ import annotations

import json

from .._tables import CHUNKS_TABLE, CONVERSATIONS_TABLE, STATUS_TABLE, parse_distinct
from .doctor_facts import gather
from .doctor_findings import WILL_NOT_WORK, Finding, exit_code, server_findings
from .doctor_table_findings import ARCHIVE_TABLE, table_findings
from .expected_tables import read_migrations

__all__ = ["WILL_NOT_WORK", "run"]

MARKS = {"ok": "ok     ", "warning": "WARNING", "error": "ERROR  "}


def run(dsn: str, chunks_table: str, status_table: str, conversations_table: str, as_json: bool) -> int:
    """Print the findings, and return the exit code: 0 well, 1 warnings, 2 will not work."""
    chunks, status, conversations = parse_distinct(chunks_table, status_table, conversations_table)
    tables = {
        STATUS_TABLE: status,
        CHUNKS_TABLE: chunks,
        ARCHIVE_TABLE: chunks.archive,
        CONVERSATIONS_TABLE: conversations,
    }
    facts = gather(dsn, tables)
    findings = [*server_findings(facts), *table_findings(facts.catalog, read_migrations(), tables)]
    code = exit_code(findings)
    if as_json:
        target = {"host": facts.host, "port": facts.port, "database": facts.catalog["database"]}
        document = {**target, "exit_code": code, "findings": [finding._asdict() for finding in findings]}
        print(json.dumps(document, indent=2))
    else:
        print(f"{facts.catalog['database']} on {facts.host}, port {facts.port}, as {facts.catalog['role']}")
        for finding in findings:
            print(_format(finding))
    return code


def _format(finding: Finding) -> str:
    remedy = f"\n         → {finding.remedy}" if finding.remedy else ""
    return f"{MARKS[finding.level]}  {finding.name}: {finding.text}{remedy}"
