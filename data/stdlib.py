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
def files(held_out: bool) -> tuple[tuple[str, Path], ...]:
    """Return (relative posix path, path) of every usable library file that is, or is not, held out; sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = ((p.relative_to(root).as_posix(), p) for p in root.rglob("*.py"))
    wanted = (each for each in found if not each[0].startswith(_SKIPPED) and is_held_out(each[0]) == held_out)
    return tuple(sorted((name, path) for name, path in wanted if _readable(path)))


def training_files() -> list[tuple[str, Path]]:
    """Return the files that training may see, a module beside its tests."""
    return sorted(files(held_out=False), key=lambda item: (group_of(item[0]), item[0]))


def held_out_files(min_bytes: int = 0) -> list[tuple[str, Path]]:
    """Return the held-out modules themselves (not their tests) of at least `min_bytes` bytes."""
    return [
        (name, path)
        for name, path in files(held_out=True)
        if not _is_test(name.split("/")) and path.stat().st_size >= min_bytes
    ]


def held_out_groups() -> list[tuple[str, list[Path]]]:
    """Return (relative posix path, paths) of every held-out module: its own file, then its tests, sorted by name.

    A module's tests are those of the same `group_of`; tests of parts of it (test_zipfile64) belong to no module.
    """
    tests: dict[str, list[Path]] = {}
    for name, path in files(held_out=True):
        if _is_test(name.split("/")):
            tests.setdefault(group_of(name), []).append(path)
    return [(name, [path, *tests.get(group_of(name), [])]) for name, path in held_out_files()]


def _readable(path: Path) -> bool:
    try:
        source = path.read_text(encoding="utf-8")
        compile(source, str(path), "exec", ast.PyCF_ONLY_AST, dont_inherit=True)
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
        return False
    return len(source) > 200
