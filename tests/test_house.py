"""The rules of the source tree: how large a file is, who imports whom, what is private.

A rule is a function that takes the tree and yields its violations, each as "file:line what". The
tree is only parsed, never imported. Below the rules, each of them is tried on a small tree that
breaks it, and all of them on one that comes close.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT

FILE_LINES = 700
FUNCTION_LINES = 60
LINE_LENGTH = 100

FACES = ("engine", "dialects", "mlx_server")
FLOORS = (  # from the lowest to the highest: imports point downwards
    "_mlx_server.inference",
    "engine",
    "_mlx_server.wire",
    "dialects",
    "_mlx_server.front",
    "mlx_server",
)
NETWORK = ("aiohttp", "http", "httpx", "requests", "socket", "socketserver", "ssl")
NETWORK += ("urllib.error", "urllib.request")
MLX = ("mlx", "mlx_lm", "transformers")
VENDORS = ("anthropic", "ollama", "openai")
FOREIGN = {  # what a floor must not import beside the floors above it
    "_mlx_server.inference": NETWORK + VENDORS,
    "engine": NETWORK + VENDORS,
    "_mlx_server.wire": NETWORK + MLX + VENDORS,
    "dialects": NETWORK + MLX + VENDORS,
}
ALLOWED = {("_mlx_server.inference.ranks", "socket")}  # the ranks of a group talk over TCP
BY_NAME = ("getattr", "setattr", "delattr", "hasattr")  # functions, or methods of `monkeypatch`


@dataclass(frozen=True)
class Source:
    """A parsed file. `path` is relative to the tree's root."""

    path: str
    module: str
    lines: list[str]
    tree: ast.Module

    @classmethod
    def read(cls, root: Path, path: Path) -> Source:
        text, relative = path.read_text("utf-8"), path.relative_to(root)
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        return cls(relative.as_posix(), module, text.splitlines(), ast.parse(text))

    def at(self, where: ast.AST | int, what: str) -> str:
        line = where if isinstance(where, int) else getattr(where, "lineno", 1)
        return f"{self.path}:{line} {what}"

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node

    def imports(self) -> Iterator[tuple[int, str]]:
        """Line and dotted name of everything imported, also inside functions: `from a import b` is
        "a.b"."""
        package = self.module.split(".")
        if not self.path.endswith("__init__.py"):
            package.pop()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) - node.level + 1] if node.level else []
                base = ".".join([*above, *filter(None, [node.module])])
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


class House:
    """The product's files and the tests' in a tree."""

    def __init__(self, root: Path):
        product = [*root.glob("*.py"), *root.glob("_mlx_server/**/*.py")]
        self.product = [Source.read(root, path) for path in sorted(product)]
        self.tests = [Source.read(root, path) for path in sorted(root.glob("tests/**/*.py"))]
        self.sources = self.product + self.tests
        self.modules = {source.module for source in self.product}

    def imports(self, source: Source) -> Iterator[tuple[int, str]]:
        """Line and name of each product module that a file imports."""
        for line, name in source.imports():
            while name and name not in self.modules:
                name = name.rpartition(".")[0]
            if name:
                yield line, name

    def private_names(self) -> set[str]:
        """Every name with one leading underscore that a class or a file of the tree defines."""
        names: set[str] = set()
        for source in self.sources:
            for node in ast.walk(source.tree):
                if isinstance(node, ast.Module | ast.ClassDef):
                    names.update(name for part in node.body for name in defined(part))
                elif (
                    isinstance(node, ast.Attribute)
                    and isinstance(node.ctx, ast.Store)
                    and is_self(node.value)
                ):
                    names.add(node.attr)
        return {name for name in names if is_private(name)}


def defined(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement of a class or a module defines."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    if isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    for target in targets:
        yield from (node.id for node in ast.walk(target) if isinstance(node, ast.Name))


def is_private(name: str) -> bool:
    return name.startswith("_") and bool(name.strip("_")) and not name.endswith("__")


def is_self(node: ast.expr) -> bool:
    """Whether an expression is `self`, `cls` or `super()`."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def floor(module: str) -> str:
    """The floor a module is on; "" for the package itself, which is below all."""
    return next((name for name in FLOORS if f"{module}.".startswith(f"{name}.")), "")


# ---- the rules


def long_files(house: House) -> Iterator[str]:
    for source in house.sources:
        if len(source.lines) > FILE_LINES:
            yield source.at(len(source.lines), f"the file has more than {FILE_LINES} lines")


def long_functions(house: House) -> Iterator[str]:
    for source in house.sources:
        for function in source.functions():
            length = (function.end_lineno or 0) - function.lineno + 1
            if length > FUNCTION_LINES:
                yield source.at(function, f"{function.name} has {length} lines")


def long_lines(house: House) -> Iterator[str]:
    for source in house.sources:
        for number, line in enumerate(source.lines, 1):
            if len(line) > LINE_LENGTH:
                yield source.at(number, f"the line has {len(line)} characters")


def modules_without_a_floor(house: House) -> Iterator[str]:
    for source in house.product:
        if source.module != "_mlx_server" and not floor(source.module):
            yield source.at(1, "the file is on no floor")


def upward_imports(house: House) -> Iterator[str]:
    rank = {name: number for number, name in enumerate(FLOORS)}
    for source in house.product:
        own = rank.get(floor(source.module), -1)
        for line, target in house.imports(source):
            inside = source.module not in FACES
            if rank.get(floor(target), -1) > own or (inside and target in FACES):
                yield source.at(line, f"imports {target}, which is above it")


def import_cycles(house: House) -> Iterator[str]:
    """Depth first; a module is reported with the import that closes the cycle."""
    sources = {source.module: source for source in house.product}
    done: set[str] = set()

    def visit(path: list[str]) -> Iterator[str]:
        module = path[-1]
        for line, target in sorted(house.imports(sources[module])):
            if target in path and target != module:
                cycle = [*path[path.index(target) :], target]
                yield sources[module].at(line, f"closes the cycle {' -> '.join(cycle)}")
            elif target not in done and target != module:
                yield from visit([*path, target])
        done.add(module)

    for module in sorted(sources):
        if module not in done:
            yield from visit([module])


def foreign_modules(house: House) -> Iterator[str]:
    for source in house.product:
        for line, name in source.imports():
            for module in FOREIGN.get(floor(source.module), ()):
                allowed = (source.module, module) in ALLOWED
                if f"{name}.".startswith(f"{module}.") and not allowed:
                    yield source.at(line, f"{floor(source.module)} must not import {module}")


def private_imports(house: House) -> Iterator[str]:
    roots = {source.module.partition(".")[0] for source in house.sources}
    roots |= {Path(source.path).stem for source in house.tests}
    for source in house.sources:
        for line, name in source.imports():
            module, _, last = name.rpartition(".")
            if module.partition(".")[0] in roots and is_private(last):
                yield source.at(line, f"imports the private {last} of {module}")


def private_attributes(house: House) -> Iterator[str]:
    own = house.private_names()
    for source in house.sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute) and node.attr in own and not is_self(node.value):
                yield source.at(node, f"{ast.unparse(node)} is private to another object")
            elif isinstance(node, ast.Call) and node.args and not is_self(node.args[0]):
                called = getattr(node.func, "attr", getattr(node.func, "id", ""))
                for argument in node.args[:2] if called in BY_NAME else []:
                    name = getattr(argument, "value", None)
                    if isinstance(name, str) and name.rpartition(".")[2] in own:
                        yield source.at(node, f"{name!r} is private to another object")


RULES: list[Callable[[House], Iterator[str]]] = [
    long_files,
    long_functions,
    long_lines,
    modules_without_a_floor,
    upward_imports,
    import_cycles,
    foreign_modules,
    private_imports,
    private_attributes,
]


@pytest.fixture(scope="module")
def house() -> House:
    return House(ROOT)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_tree_keeps_its_rules(house: House, rule: Callable[[House], Iterator[str]]):
    found = list(rule(house))
    assert not found, "\n" + "\n".join(found)


def test_the_map_names_every_file(house: House):
    named, folder = set(), ""
    for line in (ROOT / "ARCHITECTURE.md").read_text("utf-8").splitlines():
        if heading := re.match(r"### `(.+/)`$", line):
            folder = heading[1].removeprefix("./")
        elif row := re.match(r"\| `(\w+\.py)` \|", line):
            named.add(folder + row[1])
    assert named == {source.path for source in house.product}


def test_every_class_and_method_in_the_map_exists(house: House):
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    methods: dict[str, set[str]] = {}
    for source in house.sources:
        for node in source.tree.body:
            body = node.body if isinstance(node, ast.ClassDef) else []
            for name in defined(node):
                found = methods.setdefault(name, set())
                found.update(inner for part in body for inner in defined(part))
    for name, method in re.findall(r"`([A-Z]\w+)(?:\.(?!md`)(\w+))?`", text):
        exists = name in methods and (not method or method in methods[name])
        assert exists, f"ARCHITECTURE.md names {name}.{method}"


def test_every_file_that_the_papers_name_exists_and_every_test_is_named():
    named: set[str] = set()
    for paper in ("ARCHITECTURE.md", "CONTRIBUTING.md"):
        text = (ROOT / paper).read_text("utf-8")
        for name in re.findall(r"`([\w./-]+\.(?:py|md|json|toml))`", text):
            assert any(ROOT.glob(f"**/{name}")), f"{paper} names {name}"
            named.add(name)
    assert {path.name for path in ROOT.glob("tests/test_*.py")} <= named


# ---- tests of the rules


INFERENCE, WIRE, FRONT = (f"_mlx_server/{name}" for name in ("inference", "wire", "front"))


def body(count: int) -> str:
    """A function of `count` lines."""
    return "def long():\n" + "    pass\n" * (count - 1)


BROKEN = [
    (long_files, {"engine.py": "\n" * 701}, "engine.py:701 the file has more than 700 lines"),
    (long_functions, {"engine.py": "\n" + body(61)}, "engine.py:2 long has 61 lines"),
    (long_functions, {"tests/test_a.py": body(61)}, "tests/test_a.py:1 long has 61 lines"),
    (long_lines, {f"{WIRE}/a.py": "#" * 101}, f"{WIRE}/a.py:1 the line has 101 characters"),
    (long_lines, {"tests/a/b.py": "#" * 101}, "tests/a/b.py:1 the line has 101 characters"),
    (modules_without_a_floor, {"extra.py": ""}, "extra.py:1 the file is on no floor"),
    (
        modules_without_a_floor,
        {"_mlx_server/extra.py": ""},
        "_mlx_server/extra.py:1 the file is on no floor",
    ),
    (
        upward_imports,
        {f"{INFERENCE}/a.py": "from _mlx_server.wire import fields", f"{WIRE}/fields.py": ""},
        f"{INFERENCE}/a.py:1 imports _mlx_server.wire.fields, which is above it",
    ),
    (
        upward_imports,
        {f"{WIRE}/a.py": "def late():\n    from ..front.b import x", f"{FRONT}/b.py": "x = 1"},
        f"{WIRE}/a.py:2 imports _mlx_server.front.b, which is above it",
    ),
    (
        upward_imports,
        {f"{FRONT}/a.py": "from engine import Engine", "engine.py": "class Engine: ..."},
        f"{FRONT}/a.py:1 imports engine, which is above it",
    ),
    (
        upward_imports,
        {"engine.py": "import dialects", "dialects.py": ""},
        "engine.py:1 imports dialects, which is above it",
    ),
    (
        import_cycles,
        {f"{WIRE}/a.py": "from _mlx_server.wire import b", f"{WIRE}/b.py": "from .a import x"},
        f"{WIRE}/b.py:1 closes the cycle "
        "_mlx_server.wire.a -> _mlx_server.wire.b -> _mlx_server.wire.a",
    ),
    (
        foreign_modules,
        {f"{INFERENCE}/a.py": "import os\nimport http.client"},
        f"{INFERENCE}/a.py:2 _mlx_server.inference must not import http",
    ),
    (
        foreign_modules,
        {f"{INFERENCE}/a.py": "from urllib import request"},
        f"{INFERENCE}/a.py:1 _mlx_server.inference must not import urllib.request",
    ),
    (
        foreign_modules,
        {f"{INFERENCE}/a.py": "import openai"},
        f"{INFERENCE}/a.py:1 _mlx_server.inference must not import openai",
    ),
    (
        foreign_modules,
        {f"{WIRE}/a.py": "import mlx.core as mx"},
        f"{WIRE}/a.py:1 _mlx_server.wire must not import mlx",
    ),
    (
        private_imports,
        {"tests/test_a.py": "from engine import _inner", "engine.py": ""},
        "tests/test_a.py:1 imports the private _inner of engine",
    ),
    (
        private_imports,
        {"tests/test_a.py": "from bench import _inner", "tests/bench.py": ""},
        "tests/test_a.py:1 imports the private _inner of bench",
    ),
    (
        private_attributes,
        {"engine.py": "class A:\n    def f(self, other):\n        self._x = other._x"},
        "engine.py:3 other._x is private to another object",
    ),
    (
        private_attributes,
        {
            "engine.py": "class A:\n    _x: int = 1",
            "tests/test_a.py": "from engine import A\n\nA()._x",
        },
        "tests/test_a.py:3 A()._x is private to another object",
    ),
    (
        private_attributes,
        {"engine.py": "def _f(): ...", "dialects.py": "import engine\nengine._f()"},
        "dialects.py:2 engine._f is private to another object",
    ),
    (
        private_attributes,
        {
            "engine.py": "class A:\n    def _f(self): ...",
            "tests/test_a.py": "def test(monkeypatch):\n    monkeypatch.setattr('engine.A._f', 1)",
        },
        "tests/test_a.py:2 'engine.A._f' is private to another object",
    ),
]

CLOSE = {
    "engine.py": "from _mlx_server.inference.a import A\n" + "\n" * 699,
    "dialects.py": "from engine import A\nfrom _mlx_server.wire import b\n",
    "mlx_server.py": "import http.client\nimport socket\nimport dialects\nimport engine\n",
    "_mlx_server/__init__.py": "__version__ = '1'\n",
    f"{INFERENCE}/a.py": (
        "import mlx.core\nimport urllib.parse\nfrom _mlx_server import __version__\n\n\n"
        "class A:\n    def __init__(self):\n        self._x = super()._x\n"
        "        print(tuple._replace, getattr(self, '_x'))\n"
    ),
    f"{INFERENCE}/ranks.py": "import socket\n",
    f"{WIRE}/b.py": "from _mlx_server.inference.a import A\n" + body(60) + "#" * 100,
    f"{FRONT}/c.py": "import socket\nfrom mlx_lm import _private\nfrom _mlx_server.wire import b\n",
    "tests/test_a.py": "import mlx_server\nfrom engine import A\n" + "\n" * 698,
}


def plant(root: Path, files: dict[str, str]) -> House:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return House(root)


@pytest.mark.parametrize("rule, files, message", BROKEN)
def test_a_rule_finds_what_breaks_it(
    tmp_path: Path, rule: Callable[[House], Iterator[str]], files: dict[str, str], message: str
):
    assert list(rule(plant(tmp_path, files))) == [message]


def test_what_is_allowed_breaks_no_rule(tmp_path: Path):
    house = plant(tmp_path, CLOSE)
    assert [line for rule in RULES for line in rule(house)] == []
    assert {rule for rule, *_ in BROKEN} == {*RULES}
