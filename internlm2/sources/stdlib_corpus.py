"""A corpus that every machine has: the standard library of the running Python (PSF licence), read without a download.

Four parts. `code`: its modules. `packages`: long documents, of 32 KiB and more (report 3.1.3): whole packages in import
order (report 3.1.2) and single modules. `prose`: the language reference that `help()` prints. `docstrings`: one page of
API documentation for each module.
"""

import ast
import hashlib
import os
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from internlm2.config import ConfigError
from internlm2.sources.documents import Document
from internlm2.sources.repository import is_documentation, markdown_document

LONG_BYTES = 32 << 10
# Raise when a change below alters the documents: cached shards of the old kind are then not used.
DERIVATION_VERSION = 1

# Files of one top-level module or package are held out together, in all four parts. The numbers only choose which: with
# them, the 4 % hold-out of conf/data/stdlib.yaml contains `logging`, `typing`, `enum` and `ast` (180, 120, 79 and 61 KB
# in Python 3.11; 5 % of the code), so that loss by position can be measured on long text that no stage has seen, and of
# the topics `assignment`, `calls` and `function` (6 % of their text).
SPLIT_SALT = 27
TOPIC_SALT = 13

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_GENERATED = re.compile(r"^[ \t]*#.*(auto-?generated|generated (by|from)|do not edit)", re.I | re.M)
_CODEC_TABLE = re.compile(r"^(decoding_table|decoding_map|encoding_map|codec) *=", re.M)


def folder(part: str) -> Path:
    """Where the documents of a part come from."""
    return library_folder()


def library_folder() -> Path:
    """Folder of the running Python's standard library; ConfigError where it holds no source files."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    if not (folder / "ast.py").is_file():
        raise ConfigError(
            f"data kind=stdlib: {folder} holds no Python source files (a frozen Python?); name other sources"
        )
    return folder


def manifest(part: str) -> str:
    """Hash of all that the documents of a part are made of."""
    digest = hashlib.sha256(f"{DERIVATION_VERSION} {SPLIT_SALT} {TOPIC_SALT} {part}".encode())
    if part == "prose":
        for name, text in sorted(topics().items()):
            digest.update(f"{name}\0{text}\0".encode())
        return digest.hexdigest()
    for name, text in _files().items():
        digest.update(f"{name}\0{text}\0".encode())
    return digest.hexdigest()


def documents(part: str) -> Iterator[Document]:
    """Documents of one part, in a fixed order."""
    makers = {"code": _code, "packages": _packages, "prose": _prose, "docstrings": _docstrings}
    yield from makers[part]()


def input_bytes(part: str) -> int:
    """About how much text a part holds; for progress bars and sample shares."""
    if part == "prose":
        return sum(map(len, topics().values()))
    total = sum(map(len, _files().values()))
    return total // 6 if part == "docstrings" else total


def topic_key(name: str) -> str:
    """By which a topic of the language reference is held out."""
    return f"stdlib-topic-{TOPIC_SALT}:{name}"


def topics() -> dict[str, str]:
    """Name -> text of each topic of the language reference."""
    from pydoc_data import topics as module

    return module.topics


@lru_cache(maxsize=1)
def _files() -> dict[str, str]:
    """Relative path -> text of every non-test, non-generated module, exact copies once; and the documentation files
    beside them.
    """
    folder = library_folder()
    found: dict[str, str] = {}
    seen: set[bytes] = set()
    for path in _walk(folder):
        relative = path.relative_to(folder)
        name = relative.as_posix()
        if not name.endswith(".py") and not (len(relative.parts) > 1 and is_documentation(name)):
            continue
        text = _read(path)
        content = hashlib.sha256(text.encode()).digest()
        if not text.strip() or content in seen or _is_generated(name, text):
            continue
        seen.add(content)
        found[name] = text
    return found


def _walk(folder: Path) -> list[Path]:
    """Files below `folder` without the skipped folders, in an order that does not depend on the file system."""
    files: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith("config-")]
        files.extend(Path(parent, name) for name in names)
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def _read(path: Path) -> str:
    """Text of a source file in the encoding that it declares; empty for the few that declare a wrong one on purpose."""
    try:
        if path.suffix == ".py":
            with tokenize.open(path) as stream:
                return stream.read()
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, SyntaxError):
        return ""


def _is_generated(name: str, text: str) -> bool:
    if name.startswith(("_sysconfigdata", "pydoc_data/")):
        return True
    return bool(_CODEC_TABLE.search(text) if name.startswith("encodings/") else _GENERATED.search(text[:1000]))


def modules() -> dict[str, str]:
    """Relative path -> text of each module."""
    return {name: text for name, text in _files().items() if name.endswith(".py")}


def split_key(name: str) -> str:
    """Equal for the modules of one top-level package."""
    return f"stdlib-{SPLIT_SALT}:{name.split('/')[0].removesuffix('.py')}"


def _code() -> Iterator[Document]:
    for name, text in modules().items():
        yield Document(name, text=text, split_key=split_key(name))


def _packages() -> Iterator[Document]:
    groups: dict[str, dict[str, str]] = {}
    for name, text in _files().items():
        groups.setdefault(name.split("/")[0], {})[name] = text
    for name, files in groups.items():
        if sum(len(text.encode()) for text in files.values()) >= LONG_BYTES:
            yield Document(name, text=markdown_document(name.removesuffix(".py"), files), split_key=split_key(name))


def _prose() -> Iterator[Document]:
    for name, text in sorted(topics().items()):
        yield Document(name, text=text.strip() + "\n", split_key=topic_key(name))


def _docstrings() -> Iterator[Document]:
    for name, text in modules().items():
        page = documentation_page(name, text)
        if page:
            yield Document(name, text=page, split_key=split_key(name))


def documentation_page(name: str, text: str) -> str:
    """The docstrings of a module file under their names and signatures; empty where there are none."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return ""
    sections = list(_sections(tree, name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")))
    return "\n\n".join(sections) + "\n" if sections else ""


def _sections(node: ast.AST, name: str) -> Iterator[str]:
    """Heading and docstring of a module, class or function, then of what it defines."""
    text = (
        ast.get_docstring(node)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        else None
    )
    if text:
        arguments = ""
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = f"({ast.unparse(node.args)})"
        level = "#" if isinstance(node, ast.Module) else "##"
        yield f"{level} `{name}{arguments}`\n\n{text.strip()}"
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _sections(child, f"{name}.{child.name}")
