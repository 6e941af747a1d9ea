"""Query trees of statements, as PostgreSQL analyses them: with the functions of all operators and casts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import psycopg

# Parentheses, texts, and other tokens, in which a backslash quotes the next character.
TOKEN = re.compile(r'[(){}]|"(?:[^"\\]|\\.)*"|(?:\\.|[^\s(){}])+', re.DOTALL)

# The key of a node that contains the oid of its function.
FUNCTION_KEYS = ("funcid", "opfuncid", "aggfnoid", "winfnoid")
TYPE_KEYS = ("resulttype", "vartype", "paramtype", "consttype", "funcresulttype", "opresulttype", "casetype")
TYPE_KEYS += ("coalescetype", "aggtype", "minmaxtype", "array_typeid", "refrestype")

SELECT, UPDATE, INSERT, DELETE = "1", "2", "3", "4"  # CmdType
RELATION, SUBQUERY = "0", "1"  # RTEKind


class Node(NamedTuple):
    """A node of a query tree. Its values are nodes, lists and texts."""

    kind: str
    values: dict[str, Any]

    def __getitem__(self, key: str) -> Any:  # type: ignore[override]
        return self.values.get(key, "<>")


class Call(NamedTuple):
    """A call of a function, by its name, an operator or a cast."""

    function: str
    volatility: str  # i, s or v, as in pg_proc
    node: Node


def parse(text: str) -> Any:
    """Parse the text of a pg_node_tree."""
    tokens = iter(TOKEN.findall(text))
    return _parse(next(tokens), tokens)


def _parse(token: str, tokens: Iterator[str]) -> Any:
    if token == "(":
        return [_parse(item, tokens) for item in iter(tokens.__next__, ")")]
    if token != "{":
        return token
    node = Node(next(tokens), {})
    values: list[Any] = []
    for item in iter(tokens.__next__, "}"):
        if item.startswith(":"):
            node.values[item[1:]] = values = []
        else:
            values.append(_parse(item, tokens))
    for key, found in node.values.items():
        node.values[key] = found[0] if len(found) == 1 else found
    return node


def walk(value: Any) -> Iterator[Node]:
    """Iterate over the nodes in a value, each before its descendants."""
    if isinstance(value, Node):
        yield value
        value = list(value.values.values())
    if isinstance(value, list):
        for item in value:
            yield from walk(item)


class Analyzer:
    """Analyses statements. The tables must exist in the database of the connection."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection
        self._queries: dict[str, list[Node]] = {}
        self._functions: dict[str, tuple[str, str]] = {}
        for oid, name, volatility in connection.execute("SELECT oid::text, proname, provolatile::text FROM pg_proc"):
            self._functions[oid] = (name, volatility)
        types = connection.execute("SELECT oid::text, typname, typinput::oid::text, typoutput::oid::text FROM pg_type")
        self._types = {oid: functions for oid, *functions in types}

    def queries(self, statement: str) -> list[Node]:
        """Return the queries of a statement: itself, its CTEs and its subqueries."""
        if statement not in self._queries:
            self._queries[statement] = self._analyze(statement)
        return self._queries[statement]

    def _analyze(self, statement: str) -> list[Node]:
        with self._connection.transaction(force_rollback=True):
            self._connection.execute(f"PREPARE analyzed AS {statement}")
            [(types,)] = self._connection.execute(
                "SELECT parameter_types::text[] FROM pg_prepared_statements WHERE name = 'analyzed'"
            )
            # The body of such a function is stored as a query tree.
            self._connection.execute(
                f"CREATE FUNCTION pg_temp.analyzed({', '.join(types)}) RETURNS void LANGUAGE sql "
                f"BEGIN ATOMIC {statement}; END"
            )
            [(tree,)] = self._connection.execute(
                "SELECT prosqlbody::text FROM pg_proc WHERE oid = 'pg_temp.analyzed'::regproc"
            )
            self._connection.execute("DEALLOCATE analyzed")
        return [node for node in walk(parse(tree)) if node.kind == "QUERY"]

    def calls(self, value: Any, *, mutable: bool = True) -> list[Call]:
        """Return the calls in a part of a query tree; only those of functions that are not IMMUTABLE by default."""
        found = [call for node in walk(value) for call in self._calls_of(node)]
        return [call for call in found if call.volatility != "i"] if mutable else found

    def _calls_of(self, node: Node) -> Iterator[Call]:
        if node.kind == "SQLVALUEFUNCTION":  # one of several
            yield Call("current_timestamp", "s", node)
        if node.kind == "COERCEVIAIO":  # a cast by way of text
            for type_key, index in ((node["resulttype"], 1), (_type_of(node["arg"]), 2)):
                name, volatility = self._functions[self._types[type_key][index]]
                yield Call(name, volatility, node)
        for key in FUNCTION_KEYS:
            if key in node.values:
                yield Call(*self._functions[node[key]], node)


def _type_of(node: Node) -> str:
    [found] = [node[key] for key in TYPE_KEYS if key in node.values]
    return str(found)
