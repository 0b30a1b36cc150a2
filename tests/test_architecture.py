"""The shape of the code: imports point one way, and what must stay cheap or in one place does."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import specx

ROOT = Path(__file__).resolve().parent.parent
# A module imports its own layer and those before it.
LAYERS = [
    {"config", "cuda", "branches", "costs"},
    {"candidates"},
    {"tree", "lookup"},
    {
        "backends",
        "cache",
        "ranks",
        "retrieval",
        "acceptance",
        "kernels",
        "kernel_plans",
        "kernel_checks",
        "kernel_launch",
    }
    | {"kernel_attention", "kernel_scores", "kernel_commit"},
    {"static_attention"},
    {"attention"},
    {"hf_attention", "hf_config", "packed"},
    {"static"},
    {"sampling", "hf", "hf_check", "text"},
    {"target", "draft", "rotary", "hf_split"},
    {"profiles"},
    {"step_costs", "store", "generation", "sources"},
    {"worth", "draft_cache"},
    {"experience"},
    {"controller", "stretches", "auto_controller"},
    {"decoding"},
    {"data"},
    {"adapters"},
    {"api"},
    {"doctor", "retrofit_check", "training", "eval"},
    {
        *("cli", "cli_bench", "cli_controller", "cli_eval", "cli_options", "cli_ranks", "cli_report", "cli_retrofit"),
        *("cli_train", "cli_tune", "output", "progress", "__main__"),
    },
]
# Plain tables and dataclasses: anyone above config may read them, and they may not import torch.
ANYWHERE = {"specx.adapters.names", "specx.config", "specx.costs"}


def package_folders() -> list[Path]:
    """Every folder with an __init__.py: specx/, its neighbours and what is below them."""
    tops = [path.parent for path in ROOT.glob("*/__init__.py")]
    return sorted(path.parent for top in tops for path in top.rglob("__init__.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "specx" else ("specx", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for folder in package_folders() for path in sorted(folder.glob("*.py"))}


def imports(path: Path) -> list[tuple[str, int]]:
    """Every imported name, dotted, with the level of a relative import; also those inside functions."""
    found: list[tuple[str, int]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(each.name, 0) for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(f"{node.module or ''}.{each.name}", node.level) for each in node.names]
    return found


def own_imports(path: Path) -> set[str]:
    """The modules of this project that a file imports; `import specx` itself imports nothing."""
    found = set()
    for name, _ in imports(path):
        if name.split(".")[0] == "specx":
            parts = name.split(".")
            while ".".join(parts) not in MODULES:
                parts.pop()
            found.add(".".join(parts))
    return found - {"specx"}


def layer(module: str) -> int:
    top = module.split(".")[1]
    return next((number for number, names in enumerate(LAYERS) if top in names), -1)


INNER = sorted(MODULES.keys() - {"specx"})


@pytest.mark.parametrize("module", INNER)
def test_every_module_has_its_layer(module):
    assert layer(module) >= 0, f"put {module} into LAYERS"


@pytest.mark.parametrize("module", INNER)
def test_imports_point_one_way(module):
    above = {name for name in own_imports(MODULES[module]) if layer(name) > layer(module)}
    if layer(module) > 0:
        above -= ANYWHERE
    assert not above


def test_the_package_itself_imports_nothing_of_its_own():
    assert not own_imports(MODULES["specx"])


@pytest.mark.parametrize("module", sorted(ANYWHERE))
def test_tables_import_no_torch_and_nothing_but_tables(module):
    own = own_imports(MODULES[module])
    assert own <= ANYWHERE
    tops = {name.split(".")[0] for name, _ in imports(MODULES[module])}
    assert tops <= set(sys.stdlib_module_names) | {"specx"}


def test_no_import_cycles():
    graph = {module: own_imports(MODULES[module]) - {module} for module in INNER}
    while leaves := {module for module, needs in graph.items() if not needs & graph.keys()}:
        graph = {module: needs for module, needs in graph.items() if module not in leaves}
    assert not graph


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_relative_imports(module):
    assert not [name for name, level in imports(MODULES[module]) if level]


@pytest.mark.parametrize("name", ["AttentionInterface", "modeling_utils", "masking_utils", "DynamicCache"])
def test_transformers_internals_are_touched_in_one_file(name):
    users = {
        module
        for module, path in MODULES.items()
        if any(name in imported.split(".") for imported, _ in imports(path) if imported.startswith("transformers"))
    }
    assert {module for module in users if not module.startswith("specx.training.")} <= {"specx.hf_attention"}


def test_private_names_of_transformers_are_imported_nowhere():
    for path in MODULES.values():
        for name, _ in imports(path):
            private = [part for part in name.split(".") if part.startswith("_")]
            assert not (name.startswith("transformers") and private), f"{path.name} imports {name}"


def test_the_rules_can_fail(tmp_path):
    """A file that breaks every rule is seen to break it."""
    bad = tmp_path / "bad.py"
    bad.write_text("from . import x\ndef f():\n    import specx.cli\n    from specx import hf, load\n")
    assert own_imports(bad) == {"specx.cli", "specx.hf"}
    assert [level for _, level in imports(bad)] == [1, 0, 0, 0]
    assert layer("specx.hf") < layer("specx.cli")
    assert layer("specx.unheard") == -1


def test_packages_are_all_folders_with_code():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert sorted(project["packages"]) == sorted(module_name(folder / "__init__.py") for folder in package_folders())
    outside = {module_name(folder / "__init__.py"): folder for folder in package_folders()}
    for name, folder in outside.items():
        expected = folder.relative_to(ROOT).as_posix()
        written = project["package-dir"].get(name, name.replace(".", "/"))
        assert written == expected


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_specx_imports_no_torch():
    run("import sys, specx; specx.__version__; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)")


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["--version"],
        ["run", "--help"],
        ["bench", "step", "--help"],
        ["tune", "--help"],
        ["retrofit-check", "--help"],
        ["eval", "--help"],
        ["report", "--help"],
        ["train", "longspec", "--help"],
        ["models"],
    ],
    ids=" ".join,
)
def test_help_imports_no_torch(args):
    run(
        "import sys; from specx.cli import main\n"
        f"try: main({args!r}, prog_name='specx')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )


def test_the_package_offers_what_it_names():
    assert all(getattr(specx, name) for name in specx.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        specx.lode  # noqa: B018
