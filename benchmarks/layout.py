"""The order of the house: every folder of detector/ imports only what stands below it. See CONTRIBUTING.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "detector"
ORDER = (  # from the top; those of one line stand side by side, and may not import each other either
    ("__main__",),
    ("commands",),
    ("explorer", "export"),
    ("comparison",),
    ("engine",),
    ("inference",),
    ("evaluation",),
    ("model",),
    ("heads",),
    ("rpn", "backbone"),
    ("roi",),
    ("data",),
    ("weights",),
    ("config",),
    ("runtime",),
    ("settings",),
    ("threads",),
    ("checkpoint",),
    ("ops",),
    ("protocols",),
    ("structures",),
)
FLOORS = {part: floor for floor, parts in enumerate(reversed(ORDER)) for part in parts}
TOP = len(ORDER)  # detector/__init__.py, which opens the door to what its users need


def imports(source: str, name: str) -> Iterator[tuple[str, int]]:
    """(part of the detector, line) of every import, wherever in the file, of the module `name` with this source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: -node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in names:
            package, _, rest = target.partition(".")
            if package == "detector":
                yield rest.partition(".")[0], node.lineno


def imports_upwards(package: Path = PACKAGE) -> dict[tuple[str, str], list[str]]:
    """(folder or module, what it imports though that does not stand below it) -> ["file:line", ...]"""
    found: dict[tuple[str, str], list[str]] = {}
    for file in sorted(package.rglob("*.py")):
        path = file.relative_to(package)
        part = path.parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        name = ".".join(["detector", *path.with_suffix("").parts])
        for other, line in imports(file.read_text(encoding="utf-8"), name):
            # a part that the order lacks is a finding, too; `from detector import load` is the door
            if other != part and FLOORS.get(other, TOP) >= FLOORS.get(part, -1):
                places = found.setdefault((part, other), [])
                places += [place] if (place := f"{path}:{line}") not in places else []
    return found
