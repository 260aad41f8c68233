"""Order the files of a repository so that what is imported stands before its importer, and join them into one Markdown
document.

Report 3.1.2: files are regrouped by repository, imports found with regular expressions, files sorted topologically;
documentation goes before the first code file of its folder, a cycle starts at its alphabetically first file, of several
candidate paths the shorter wins.
"""

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+(?P<source>\.*[\w.]*)[ \t]+import[ \t]+(?P<names>\([^)]*\)|[^\n#;]+)"
    r"|import[ \t]+(?P<modules>[\w., \t]+))",
    re.M,
)
_DOCUMENTATION = re.compile(r"^(readme|changelog|changes|news|todo|notes?|history)\b.*|.*\.(md|rst)$", re.I)


def is_documentation(path: str) -> bool:
    """Whether a file belongs before the code of its folder: a README, or any Markdown or reStructuredText file."""
    return not path.endswith(".py") and bool(_DOCUMENTATION.match(PurePosixPath(path).name))


def imports_of(path: str, text: str, modules: dict[str, str]) -> set[str]:
    """Files among `modules` (dotted name -> path) that the Python file at `path` imports.

    `from package import name` counts as an import of the submodule `name` where there is one, and of
    `package/__init__.py` only otherwise: else every `__init__` that re-exports its package would drag in files which
    the importer never uses.
    """
    package = _dotted(path) if path.endswith("__init__.py") else _dotted(path).rpartition(".")[0]
    found: set[str] = set()
    for match in _IMPORT.finditer(text):
        if match["modules"] is not None:
            for item in match["modules"].split(","):
                words = item.split()
                if words:
                    found |= _longest_match(words[0], modules)
            continue
        source = _absolute(match["source"], package)
        if source is None:
            continue
        names = [
            words.split()[0] for words in match["names"].strip("() \t\n").replace("\n", " ").split(",") if words.split()
        ]
        candidates = [modules.get(f"{source}.{name}".lstrip(".")) for name in names]
        found |= {path for path in candidates if path is not None}
        if None in candidates:
            found |= _longest_match(source, modules)
    return found - {path}


def dependency_order(files: dict[str, str]) -> list[str]:
    """Paths of `files` (path -> text): imported before importer, ties and the starts of cycles alphabetical,
    documentation ahead.
    """
    code = sorted(path for path in files if path.endswith(".py"))
    modules = _module_index(code)
    imports = {path: imports_of(path, files[path], modules) for path in code}
    ordered = _topological(code, imports)
    documentation = sorted(path for path in files if path not in imports)
    placed: list[str] = []
    for path in ordered:
        folders = {str(folder) for folder in (PurePosixPath(path).parent, *PurePosixPath(path).parent.parents)}
        ready = [document for document in documentation if str(PurePosixPath(document).parent) in folders]
        placed.extend(sorted(ready, key=lambda document: (document.count("/"), document)))
        documentation = [document for document in documentation if document not in ready]
        placed.append(path)
    return placed + documentation


def markdown_document(title: str, files: dict[str, str]) -> str:
    """One document of all files in dependency order: a heading and a code block each; documentation stands as it is."""
    parts = [f"# {title}\n"]
    for path in dependency_order(files):
        text = files[path]
        if path.endswith(".py"):
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"^`+", text, re.M)), default=0))
            parts.append(f"## {path}\n\n{fence}python\n{text.rstrip()}\n{fence}\n")
        else:
            parts.append(f"## {path}\n\n{text.rstrip()}\n")
    return "\n".join(parts)


def _dotted(path: str) -> str:
    parts = PurePosixPath(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _module_index(code: list[str]) -> dict[str, str]:
    """Dotted name -> path. A file is also known by its name below folders that are no packages (`src/pkg/a.py` is
    `pkg.a`).
    """
    packages = {str(PurePosixPath(path).parent) for path in code if path.endswith("__init__.py")}
    index: dict[str, str] = {}
    for path in sorted(code, key=lambda path: (len(path), path)):
        parts = _dotted(path).split(".")
        index.setdefault(".".join(parts), path)
        for cut in range(1, len(parts)):
            if "/".join(parts[:cut]) in packages:
                break
            index.setdefault(".".join(parts[cut:]), path)
    return index


def _longest_match(name: str, modules: dict[str, str]) -> set[str]:
    """`import a.b.c` means the longest prefix that is a file here."""
    while name:
        path = modules.get(name)
        if path is not None:
            return {path}
        name = name.rpartition(".")[0]
    return set()


def _absolute(source: str, package: str) -> str | None:
    level = len(source) - len(source.lstrip("."))
    if level == 0:
        return source or None
    parts = package.split(".") if package else []
    if level - 1 > len(parts):
        return None
    base = parts[: len(parts) - (level - 1)]
    return ".".join([*base, *([source[level:]] if source[level:] else [])])


def _topological(paths: list[str], imports: dict[str, set[str]]) -> list[str]:
    """Imported before importer. In a cycle the alphabetically first file comes first and the rest is ordered anew
    without it.
    """
    ordered: list[str] = []
    groups = [list(paths)]  # a stack; a group of one is a finished file
    while groups:
        group = groups.pop()
        if len(group) == 1:
            ordered.extend(group)
            continue
        inside = set(group)
        for component in reversed(_components(group, {path: imports[path] & inside for path in group})):
            if len(component) == 1:
                groups.append(component)
            else:
                first, *rest = sorted(component)
                groups.extend([rest, [first]])
    return ordered


def _components(paths: Iterable[str], imports: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components (Tarjan, without recursion), each after every component that it imports."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    on_stack: set[str] = set()
    components: list[list[str]] = []
    for root in paths:
        if root in number:
            continue
        work = [(root, iter(sorted(imports[root])))]
        number[root] = low[root] = len(number)
        stack.append(root)
        on_stack.add(root)
        while work:
            path, children = work[-1]
            child = next(children, None)
            if child is None:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[path])
                if low[path] == number[path]:
                    cut = stack.index(path)
                    components.append(stack[cut:])
                    on_stack.difference_update(stack[cut:])
                    del stack[cut:]
            elif child not in number:
                number[child] = low[child] = len(number)
                stack.append(child)
                on_stack.add(child)
                work.append((child, iter(sorted(imports[child]))))
            elif child in on_stack:
                low[path] = min(low[path], number[child])
    return components
