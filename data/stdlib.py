"""The running interpreter's standard library as long, real text: what the bundled pair is trained and tried on.

`HELD_OUT` names the modules that training never sees, nor their tests, so that a measurement on them is honest.
"""

import ast
import sysconfig
from functools import cache
from pathlib import Path

HELD_OUT = (
    "_pydecimal",
    "argparse",
    "asyncio/base_events",
    "configparser",
    "decimal",
    "difflib",
    "doctest",
    "ftplib",
    "http/cookiejar",
    "imaplib",
    "ipaddress",
    "mailbox",
    "optparse",
    "pickletools",
    "shutil",
    "smtplib",
    "statistics",
    "subprocess",
    "tarfile",
    "turtle",
    "unittest/mock",
    "zipfile",
)
# Character tables and generated text: many bytes, no language.
_SKIPPED = ("encodings/", "pydoc_data/", "lib2to3/tests/data/", "site-packages/", "test/encoded_modules/")


def group_of(relative: str) -> str:
    """Return the module that a file belongs to: `test/test_argparse.py` belongs to `argparse`."""
    parts = relative.removesuffix(".py").removesuffix("/__init__").split("/")
    if not _is_test(parts):
        return "_".join(parts)
    stems = (part.removeprefix("test").removeprefix("_") for part in parts if part not in ("test", "tests"))
    return "_".join(stem for stem in stems if stem)


def is_held_out(relative: str) -> bool:
    """Tell whether a library file, given as a relative posix path, is one that training never sees."""
    parts = relative.removesuffix(".py").removesuffix("/__init__").split("/")
    names = {name.replace("/", "_") for name in HELD_OUT} | {name.split("/")[-1] for name in HELD_OUT}
    group = group_of(relative)
    if _is_test(parts):  # also test_zipfile64, test_asyncio/test_base_events, test_http_cookiejar
        return any(group.startswith(name) or f"_{name}" in group for name in names)
    return group in {name.replace("/", "_") for name in HELD_OUT} or parts[0] in HELD_OUT


def _is_test(parts: list[str]) -> bool:
    return any(part in ("test", "tests") for part in parts)


@cache
def files() -> tuple[tuple[str, Path], ...]:
    """Return (relative posix path, path) of every usable library file, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = ((p.relative_to(root).as_posix(), p) for p in root.rglob("*.py"))
    return tuple(sorted((name, path) for name, path in found if not name.startswith(_SKIPPED) and _readable(path)))


def training_files() -> list[tuple[str, Path]]:
    """Return the files that training may see, a module beside its tests."""
    kept = [(name, path) for name, path in files() if not is_held_out(name)]
    return sorted(kept, key=lambda item: (group_of(item[0]), item[0]))


def held_out_files(min_bytes: int = 0) -> list[tuple[str, Path]]:
    """Return the held-out modules themselves (not their tests) of at least `min_bytes` bytes."""
    return [
        (name, path)
        for name, path in files()
        if is_held_out(name) and not _is_test(name.split("/")) and path.stat().st_size >= min_bytes
    ]


def _readable(path: Path) -> bool:
    try:
        source = path.read_text(encoding="utf-8")
        compile(source, str(path), "exec", ast.PyCF_ONLY_AST, dont_inherit=True)
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
        return False
    return len(source) > 200
