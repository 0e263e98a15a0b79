"""Completion of `FILE.py:CLASS`: files first, then the classes in one, which is read but not executed."""

from __future__ import annotations


def class_names(incomplete: str) -> list[str]:
    """What the word may become."""
    import ast
    from pathlib import Path

    file, colon, beginning = incomplete.rpartition(":")
    if colon:
        try:
            tree = ast.parse(Path(file).read_bytes())
        except (OSError, SyntaxError, ValueError, RecursionError):
            return []
        names = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
        return [f"{file}:{name}" for name in names if name.startswith(beginning) and not name.startswith("_")]
    directory, slash, beginning = incomplete.rpartition("/")
    try:
        found = sorted(Path(directory + slash or ".").iterdir())
    except OSError:
        return []
    return [
        f"{directory}{slash}{path.name}{'/' if path.is_dir() else ':'}"
        for path in found
        if path.name.startswith(beginning) and (path.is_dir() or path.suffix == ".py")
        if not path.name.startswith(".") or beginning.startswith(".")
    ]
