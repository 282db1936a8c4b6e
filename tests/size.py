"""`make size`: files, lines, and the deepest chain of imports inside each package."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "lib",
    "lib/clients",
    "lib/clients/falkordb",
    "lib/clients/qdrant",
    "lib/clients/embeddings",
    "lib/backup",
    "lib/verify",
    "lib/reembed",
    "lib/restore",
    "scripts",
    "tests/sandbox",
    "tests/sandbox/qdrant_server",
)


def modules(folder: str) -> dict[str, Path]:
    """The modules right in a folder, by their dotted names."""
    paths = sorted(one for one in (ROOT / folder).glob("*.py") if one.name != "__init__.py")
    return {f"{folder.replace('/', '.')}.{path.stem}": path for path in paths}


def imported(path: Path) -> set[str]:
    """What a module imports from this project when it is loaded, by dotted names."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{one.name}" for one in node.names}
    return found


def depth(folder: str) -> int:
    """The number of modules in the longest chain of imports that stays in the folder."""
    inside = modules(folder)
    edges = {name: imported(path) & set(inside) for name, path in inside.items()}

    @cache
    def below(name: str) -> int:
        return 1 + max((below(one) for one in edges[name]), default=0)

    return max(map(below, edges), default=0)


def main() -> None:
    """Print the table, and the sum of lib."""
    print(f"{'package':30} {'files':>5} {'lines':>6} {'longest':>7} {'depth':>5}")
    for folder in PACKAGES:
        sizes = [len(path.read_text().splitlines()) for path in modules(folder).values()]
        print(f"{folder:30} {len(sizes):5} {sum(sizes):6,} {max(sizes):7} {depth(folder):5}")
    files = [one for one in (ROOT / "lib").rglob("*.py") if one.name != "__init__.py"]
    print(f"{'lib as a whole':30} {len(files):5} {sum(len(one.read_text().splitlines()) for one in files):6,}")


if __name__ == "__main__":
    main()
