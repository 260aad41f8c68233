"""A room imports from lower floors only, and nothing heavy is imported before the config was checked."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "internlm2"
FLOORS = [
    {"config", "ops", "permutation"},
    {"model", "run", "plan"},
    {"text"},
    {"sources"},
    {"data", "engine", "generation"},
    {"rlhf"},
    {"evaluate"},
    {"stages"},
    {"convert", "chat", "launch", "dry_run"},
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(file: Path) -> set[str]:
    """Rooms of this package that a file imports, at any depth of its code."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import; write internlm2.<room> so that the floor is visible"
            modules |= (
                {f"{node.module}.{name.name}" for name in node.names} if node.module == "internlm2" else {node.module}
            )
    return {module.split(".")[1] for module in modules if module.startswith("internlm2.")}


EXPORTED = PACKAGE / "model" / "huggingface"  # copied into export folders, where it stands on its own
FILES = [
    file
    for file in sorted(PACKAGE.rglob("*.py"))
    if file.parent != EXPORTED and (file.parent != PACKAGE or file.stem in FLOOR)
]
LIGHT = ["internlm2", "internlm2.config", "internlm2.config.compose", "internlm2.sources.source"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_downwards(file: Path):
    room = room_of(file)
    assert room in FLOOR, f"{file}: name the floor of room {room} in tests/test_floors.py"
    for other in imported_rooms(file) - {room}:
        allowed = other == "config" or FLOOR[other] < FLOOR[room]
        assert allowed, f"{file} imports room {other}, which is not on a lower floor"


@pytest.mark.parametrize(
    "module", ["internlm2", "internlm2.config", "internlm2.config.compose", "internlm2.sources.source"]
)
def test_stays_light(module: str):
    code = f"import sys, {module}; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert output.stdout.strip() == "[]"
