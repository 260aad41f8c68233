"""Dependency order of a repository, against the rules of report 3.1.2."""

import ast
import graphlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm2.sources import stdlib_corpus
from internlm2.sources.repository import dependency_order, imports_of, markdown_document


def test_imported_stands_before_importer():
    files = {
        "pkg/__init__.py": "from .app import main\n",
        "pkg/app.py": "import os\nfrom pkg import core\nfrom .util import (\n    one,\n    two,\n)\n",
        "pkg/core.py": "from .util import one\n",
        "pkg/util.py": "import json\n",
    }
    assert dependency_order(files) == ["pkg/util.py", "pkg/core.py", "pkg/app.py", "pkg/__init__.py"]


def test_a_cycle_starts_at_its_alphabetically_first_file():
    files = {"c.py": "import a\n", "a.py": "import b\n", "b.py": "import c\n", "z.py": "", "d.py": "import c, z\n"}
    assert dependency_order(files) == ["a.py", "c.py", "b.py", "z.py", "d.py"]


def test_documentation_stands_before_the_code_of_its_folder():
    files = {"README.md": "top", "lib/README": "lib", "lib/x.py": "import y\n", "y.py": "", "docs/guide.md": "guide"}
    assert dependency_order(files) == ["README.md", "y.py", "lib/README", "lib/x.py", "docs/guide.md"]


def test_submodule_import_does_not_drag_in_the_package():
    files = {"p/__init__.py": "from .a import *\nfrom .b import *\n", "p/a.py": "from . import b\n", "p/b.py": ""}
    assert dependency_order(files) == ["p/b.py", "p/a.py", "p/__init__.py"]


def test_a_module_of_the_same_name_elsewhere_is_not_imported():
    modules = {"asyncio.subprocess": "asyncio/subprocess.py", "asyncio": "asyncio/__init__.py"}
    assert imports_of("asyncio/base.py", "import subprocess\n", modules) == set()
    assert imports_of("asyncio/base.py", "from . import subprocess\n", modules) == {"asyncio/subprocess.py"}


def test_source_folders_and_the_shorter_of_several_candidates():
    files = {"src/app/a.py": "import tool\n", "src/tool.py": "", "other/deeper/tool.py": "", "src/app/__init__.py": ""}
    assert dependency_order(files).index("src/tool.py") < dependency_order(files).index("src/app/a.py")


def test_relative_imports_climb():
    modules = {"p.q.r": "p/q/r.py", "p.s": "p/s.py", "p": "p/__init__.py"}
    assert imports_of("p/q/r.py", "from ..s import x\n    from .. import s\n", modules) == {"p/s.py"}
    assert imports_of("p/q/r.py", "from .....far import x\n", modules) == set()


names = st.integers(0, 12).map(lambda number: f"m{number:02d}")


@given(edges=st.dictionaries(names, st.sets(names, max_size=4), min_size=1))
def test_acyclic_orders_agree_with_graphlib(edges):
    files = {f"{name}.py": "".join(f"import {other}\n" for other in sorted(others)) for name, others in edges.items()}
    order = dependency_order(files)
    assert sorted(order) == sorted(files)
    inside = {name: {other for other in others if other in edges and other != name} for name, others in edges.items()}
    sorter = graphlib.TopologicalSorter(inside)
    try:
        sorter.prepare()
    except graphlib.CycleError:
        return
    place = {path.removesuffix(".py"): index for index, path in enumerate(order)}
    assert all(place[other] < place[name] for name, others in inside.items() for other in others)


def test_a_large_cycle_does_not_overflow_the_stack():
    count = 1500
    files = {f"m{number:04d}.py": f"import m{(number + 1) % count:04d}\n" for number in range(count)}
    order = dependency_order(files)
    assert order[0] == "m0000.py"
    assert order[1:] == [f"m{number:04d}.py" for number in range(count - 1, 0, -1)]


@pytest.mark.parametrize("package", ["json", "email", "xml", "logging"])
def test_imports_of_real_packages_agree_with_ast(package):
    """Oracle: imports found by Python's own parser (absolute and relative, of files of the package)."""
    files = {name: text for name, text in stdlib_corpus.modules().items() if name.startswith(f"{package}/")}
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in files}
    for path, text in files.items():
        folder = path.split("/")[:-1]
        wanted = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                base = folder[: len(folder) - node.level + 1] if node.level else []
                source = ".".join([*base, *([node.module] if node.module else [])])
                for alias in node.names:
                    wanted.add(modules.get(f"{source}.{alias.name}") or modules.get(source))
            elif isinstance(node, ast.Import):
                wanted |= {modules.get(alias.name) for alias in node.names}
        assert wanted - {None, path} <= imports_of(path, text, modules)


def test_markdown_document():
    text = markdown_document("demo", {"demo/a.py": 'X = """\n```\n"""\n', "demo/README.md": "# About\n"})
    assert text.startswith("# demo\n\n## demo/README.md\n\n# About\n")
    assert '````python\nX = """\n```\n"""\n````' in text
