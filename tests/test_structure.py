"""The shape of xxl_executor.py: sections in order, one direction between them, few imports, an old
syntax."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROGRAM

SOURCE = PROGRAM.read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
BANNER = re.compile(r"^# -{20,}\n# (\d+) (.+)\n# -{20,}\n", re.MULTILINE)
NAMES = [
    "vocabulary",
    "config",
    "metrics",
    "HTTP server",
    "executor API",
    "core",
    "job processes",
    "job logs",
    "journal",
    "callbacks",
    "admin client",
    "registration",
    "systemd",
    "daemon",
    "CLI",
]
LAYERS = range(4, 13)
MODULES = {alias.name for node in TREE.body if isinstance(node, ast.Import) for alias in node.names}


def sections():
    """[(number, name, first line of its body, line after its body)]"""
    found = [
        (int(banner[1]), banner[2], SOURCE.count("\n", 0, banner.end()) + 1)
        for banner in BANNER.finditer(SOURCE)
    ]
    ends = [line - 3 for _, _, line in found[1:]] + [SOURCE.count("\n") + 1]
    return [(*section, end) for section, end in zip(found, ends)]


def body(number):
    """The top-level statements of section `number`."""
    [(first, end)] = [(first, end) for found, _, first, end in sections() if found == number]
    return [node for node in TREE.body if first <= node.lineno < end]


def classes(statements):
    return {
        node.name
        for statement in statements
        for node in ast.walk(statement)
        if isinstance(node, ast.ClassDef)
    }


def annotations(node):
    """The annotations at `node`, those that are strings as what they say."""
    for name in ("annotation", "returns"):
        for part in ast.walk(getattr(node, name, None) or ast.Pass()):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield ast.parse(part.value, mode="eval").body


def names(statements):
    """All that the statements name, also in string annotations; `sqlite3.Connection` is the name of
    another module."""
    found, left = set(), list(statements)
    while left:
        for node in ast.walk(left.pop()):
            left += annotations(node)
            if isinstance(node, ast.Name):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and not (
                isinstance(node.value, ast.Name) and node.value.id in MODULES
            ):
                found.add(node.attr)
            elif isinstance(node, ast.alias):
                found.add(node.name)
    return found


def upward(layers):
    """Every (section, class) where a layer of {number: statements} names a class of an earlier
    one."""
    found, earlier = [], set()
    for number in sorted(layers):
        found += [(number, name) for name in sorted(names(layers[number]) & earlier)]
        earlier |= classes(layers[number])
    return found


def test_sections_are_numbered_and_named_in_order():
    assert [(number, name) for number, name, *_ in sections()] == list(enumerate(NAMES, 1))


def test_no_section_is_empty_and_nothing_stands_before_the_first():
    for number in range(1, 16):
        assert body(number), f"section {number}"
    first = sections()[0][2]
    for node in TREE.body:
        if node.lineno < first:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            own = ("open_closed_streams", "run_compiled")
            becomes = isinstance(node, ast.If) or getattr(node, "name", "") in own
            plain = (ast.Import, ast.ImportFrom, ast.Assign)
            assert docstring or becomes or isinstance(node, plain), (
                f"line {node.lineno} belongs into a section"
            )


def test_no_layer_names_a_class_of_an_earlier_layer():
    assert upward({number: body(number) for number in LAYERS}) == []


@pytest.mark.parametrize(
    "use",
    [
        "def f(): return HttpServer()",
        "x = module.HttpServer",
        "from xxl_executor import HttpServer",
        "def f(x: HttpServer): pass",
        "def f(x: 'HttpServer'): pass",
        "def f() -> 'typing.List[HttpServer]': pass",
        "x: 'HttpServer' = None",
        "class Own(HttpServer): pass",
        "def f(*x: 'HttpServer'): pass",
        "async def f() -> HttpServer: pass",
        "f = lambda: HttpServer",
        "def f():\n    class Own:\n        x: 'HttpServer'",
    ],
)
def test_the_test_above_sees(use):
    """Each way to name a class counts; the same within one layer, or downward, is fine."""
    server, user = ast.parse("class HttpServer: pass").body, ast.parse(use).body
    assert upward({4: server, 8: user}) == [(8, "HttpServer")]
    assert upward({4: user, 8: server}) == []
    assert upward({4: server + user}) == []


def test_the_layers_define_classes():
    """Else the direction above would hold of nothing."""
    for number in LAYERS:
        assert classes(body(number)), f"section {number}"


def imports():
    """{top-level module: lines} of every import, also of those inside functions."""
    found = {}
    for node in ast.walk(TREE):
        modules = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else (
                ["." * node.level + (node.module or "")] if isinstance(node, ast.ImportFrom) else []
            )
        )
        for module in modules:
            found.setdefault(module.partition(".")[0], []).append(node.lineno)
    return found


@pytest.mark.skipif(sys.version_info < (3, 10), reason="sys.stdlib_module_names came with 3.10")
def test_imports_are_the_standard_library_and_two_packages():
    """urllib3 comes with requests."""
    foreign = {
        module: lines
        for module, lines in imports().items()
        if module not in sys.stdlib_module_names
    }
    assert foreign.keys() <= {"requests", "urllib3", "yaml"}, foreign


def test_nothing_sleeps_and_nothing_reaps_what_is_not_its_own():
    # Assembled, not written out: a search through the tests finds no use either.
    for pattern in (
        r"\bwaitpid\(\s*-" + "1",
        r"\btime\." + r"sleep\(",
        r"\bfrom time import\b.*" + "sleep",
    ):
        assert not re.search(pattern, SOURCE), pattern
    for node in ast.walk(TREE):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr != "sleep", f"line {node.lineno}"
            if node.func.attr in ("waitpid", "wait3", "wait4", "waitid") and node.args:
                assert not isinstance(node.args[0], ast.UnaryOp), f"line {node.lineno}"
            assert (node.func.attr, ast.dump(node.func.value)) != (
                "wait",
                ast.dump(ast.parse("os", mode="eval").body),
            ), f"line {node.lineno}"


def test_importing_needs_no_package():
    """The Python server runs under interpreters that have neither."""
    program = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("requests", "urllib3", "yaml"):
            raise ModuleNotFoundError("blocked: " + name)
sys.meta_path.insert(0, Block())
sys.path.insert(0, {str(PROGRAM.parent)!r})
import xxl_executor
try:
    import requests
except ModuleNotFoundError as error:
    print(xxl_executor.__version__, error)
"""
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=60
    )
    version = re.search(r'^__version__ = "(.+)"$', SOURCE, re.MULTILINE)[1]
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"{version} blocked: requests\n", "")


def test_importing_starts_nothing_and_prints_nothing():
    program = (
        "import threading, logging, xxl_executor\n"
        "print(threading.active_count(), logging.getLogger().handlers)"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=PROGRAM.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "1 []\n", "")


def interpreters():
    """Python 3.9 and later where pyenv puts them; none elsewhere."""
    found = Path.home().glob(".pyenv/versions/3.*/bin/python")
    return sorted(str(path) for path in found if int(path.parts[-3].split(".")[1]) >= 9)


@pytest.mark.parametrize(
    "interpreter",
    interpreters() or [pytest.param("", marks=pytest.mark.skip("no other interpreter here"))],
)
def test_it_starts_under_every_interpreter(interpreter):
    ran = subprocess.run(
        [interpreter, "-I", "-W", "error", str(PROGRAM), "--version"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ran.returncode, ran.stderr) == (0, "") and re.fullmatch(
        r"xxl-executor \d+\.\d+\.\d+\n", ran.stdout
    )


def test_the_syntax_is_that_of_python_3_9():
    ast.parse(SOURCE, feature_version=(3, 9))
    # feature_version lets pass what only the grammar of a later version knows; these are the likely
    # ones.
    for node in ast.walk(TREE):
        assert type(node).__name__ not in ("Match", "TryStar", "TypeAlias"), f"line {node.lineno}"


def test_the_map_in_the_docstring_lists_the_sections():
    words = " ".join(ast.get_docstring(TREE).split())
    assert (
        "sections: " + ", ".join(f"{number} {name}" for number, name in enumerate(NAMES, 1)) + "."
        in words
    )


@pytest.mark.parametrize("kind, most", [(ast.FunctionDef, 50), (ast.ClassDef, 200)])
def test_nothing_is_longer_than_one_reads_at_once(kind, most):
    """ruff limits the complexity of functions; this is what one reads without losing the thread."""
    lengths = [
        (node.name, node.end_lineno - node.lineno + 1)
        for node in ast.walk(TREE)
        if isinstance(node, kind)
    ]
    assert [found for found in lengths if found[1] > most] == []


def test_no_part_of_a_section_is_longer_than_600_lines():
    begins = [
        (match[1], SOURCE.count("\n", 0, match.start()))
        for match in re.finditer(r"^# (\d+[a-z]? .+)\n# -{20,}\n", SOURCE, re.MULTILINE)
    ]
    ends = [line for _, line in begins[1:]] + [SOURCE.count("\n")]
    assert [part for (part, first), end in zip(begins, ends) if end - first > 600] == []
