"""Imports point one way: each folder of nybble may import itself and those before it in ORDER."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from nybble.formats.format import FORMATS

PROJECT = Path(__file__).parents[1]
SOURCE = PROJECT / "src" / "nybble"
# They import nothing of nybble; anyone may import them.
LEAVES = ("openmp", "errors", "units", "events", "sizes", "cards", "pictures", "network")
ORDER = (
    *("options", "files", "formats", "kernels", "calibration", "data", "families", "layers", "sources", "memory"),
    *("generation", "quantization", "planning", "runs", "training", "evaluation", "exporting", "serving", "bridge"),
    *("hf", "api", "cli"),
)
# Which device it is matters to what runs there, to where bytes lie, and to what a plan measures; others ask these.
DEVICE_PLACES = ("nybble.kernels", "nybble.memory", "nybble.planning.machine")
# Imported where they are installed, needed nowhere.
OPTIONAL_PACKAGES = {"bitsandbytes", "peft", "triton", "accelerate", "llama-cpp-python", "lm-eval"}
OPTIONAL_PACKAGES |= {"trackio", "tensorboard", "wandb", "mlflow"}
OPTIONAL_PACKAGES |= {"starlette", "uvicorn", "llama-cpp"}  # the last by its import name, where it is not installed
# Places that may name a four-bit format in a string; what tells formats apart elsewhere is asked of the table.
NAME_FORMATS = ("formats", "options", "kernels")
WITHOUT_TORCH = (
    *("nybble.formats.format", "nybble.formats.quant_spec", "nybble.planning.costs", "nybble.planning.strategies"),
    *("nybble.planning.calibration_costs", "nybble.planning.machine_table", "nybble.planning.planner"),
    *("nybble.planning.cuda_costs", "nybble.planning.run_shape", "nybble.planning.work"),
    "nybble.families",
)

MODULES = {
    ".".join(("nybble", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}


@functools.cache
def imports_of(module: str) -> list[tuple[str, int, bool]]:
    """Each module that `module` imports, the line, and whether only the type checker sees that import."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for statement in block.body
        for node in ast.walk(statement)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno, id(node) in for_types) for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: imports are absolute here"
            for alias in node.names:
                full_name = f"{node.module}.{alias.name}"
                name = full_name if full_name in MODULES else str(node.module)
                found.append((name, node.lineno, id(node) in for_types))
    return found


def place(module: str) -> str:
    """`nybble.data.packing` -> `data`; nybble itself -> the empty string."""
    return (*module.split("."), "")[1]


def violation(importer: str, imported: str) -> str | None:
    """Why a module at `importer` may not import one at `imported`; both are places."""
    if imported in ("", importer):
        return None
    if importer in LEAVES:
        return f"{importer} is a leaf"
    if imported in LEAVES or importer in ("", "__main__"):
        return None
    if ORDER.index(imported) > ORDER.index(importer):
        return f"{imported} comes after {importer}"
    return None


def test_every_folder_and_module_has_its_place() -> None:
    places = {place(module) for module in MODULES} - {"", "__main__"}
    assert places <= {*LEAVES, *ORDER}, "list new folders in ORDER, where their imports allow"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_upward(module: str) -> None:
    for imported, line, _ in imports_of(module):
        if imported.split(".")[0] == "nybble":
            problem = violation(place(module), place(imported))
            assert problem is None, f"{MODULES[module]}:{line} imports {imported}: {problem}"


def test_the_rule_itself_refuses_what_it_should() -> None:
    assert violation("formats", "kernels") and violation("options", "formats") and violation("errors", "units")
    assert violation("training", "evaluation") and violation("training", "cli")
    assert not violation("kernels", "formats") and not violation("cli", "options") and not violation("data", "data")


def test_only_the_command_line_prints() -> None:
    """Everything else returns results and tells a listener what happens."""
    for module, path in MODULES.items():
        if place(module) == "cli":
            continue
        for imported, line, _ in imports_of(module):
            assert imported.split(".")[0] != "rich", f"{path}:{line} imports rich"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            prints = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            assert not prints, f"{path}:{node.lineno} prints"


def test_runs_are_read_without_the_session_that_made_them() -> None:
    for module in MODULES:
        if place(module) in ("evaluation", "exporting", "serving"):
            assert "nybble.training.session" not in {name for name, _, _ in imports_of(module)}, module


def test_a_source_is_asked_what_it_can_and_never_what_it_is() -> None:
    """Outside of `sources/` no isinstance names a place of weights, a class that is a StoredModel."""
    trees = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in MODULES.items()}
    classes = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    stored = {"StoredModel"}
    while more := {each.name for each in classes if stored & set(map(ast.unparse, each.bases))} - stored:
        stored |= more
    assert stored >= {"FolderSource", "GgufSource", "DitheredSource", "MergedSource"}
    for module, tree in trees.items():
        for node in ast.walk(tree) if place(module) != "sources" else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                named = {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)} & stored
                assert not named, f"{MODULES[module]}:{node.lineno} asks for {named}: let a StoredModel answer"


def test_no_import_cycles() -> None:
    imported_by = {
        module: {name for name, _, for_types in imports_of(module) if name in MODULES and not for_types}
        for module in MODULES
    }
    remaining = dict(imported_by)
    while free := [module for module, imported in remaining.items() if not imported & remaining.keys() - {module}]:
        for module in free:
            del remaining[module]
    # A package's __init__ that imports its own modules is no cycle unless one of them imports the package.
    assert not remaining, f"these import each other in a circle: {sorted(remaining)}"


def test_plain_numbers_need_no_torch() -> None:
    """Asked of a fresh process, since what is imported indirectly counts too."""
    imports = f"import sys, {', '.join(WITHOUT_TORCH)}"
    found = "[name for name in ('torch', 'transformers') if name in sys.modules]"
    command = [sys.executable, "-c", f"{imports}; print({found})"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_triton_is_imported_by_calls_only() -> None:
    """It takes time, and most machines have no card: importing nybble imports none of the modules that need it."""
    kernels = "nybble.kernels.backends.triton.jit"
    for module, path in MODULES.items():
        if module.startswith(kernels):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not ast.unparse(node).startswith((f"from {kernels}", "import triton", "from triton")), module


@pytest.mark.parametrize("module", [module for module in MODULES if place(module) not in NAME_FORMATS])
def test_formats_are_asked_for_by_what_they_are(module: str) -> None:
    """A format's name in a string is a case that a new format has to be added to."""
    named = re.compile(rf"\b({'|'.join(FORMATS)})\b")
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {
        id(getattr(node.body[0], "value", None)) for node in ast.walk(tree) if isinstance(node, owners) and node.body
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            assert not named.search(node.value), f"{MODULES[module]}:{node.lineno}: ask nybble.formats.format"


def device_comparisons(source: str) -> list[int]:
    """Lines in which the type of a device is compared, or a tensor is asked whether it is CUDA's."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = (node.left, *node.comparators)
            types = [side for side in sides if isinstance(side, ast.Attribute) and side.attr == "type"]
            named = [side for side in sides if isinstance(side, ast.Name) and side.id == "device_type"]
            lines += [node.lineno] if types or named else []
        if isinstance(node, ast.Attribute) and node.attr in ("is_cuda", "is_cpu"):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("module", MODULES)
def test_few_places_tell_devices_apart(module: str) -> None:
    if not any(f"{module}.".startswith(f"{allowed}.") for allowed in DEVICE_PLACES):
        lines = device_comparisons(MODULES[module].read_text(encoding="utf-8"))
        assert not lines, f"{MODULES[module]}:{lines} compares a device's type: ask kernels/ or memory/ what is meant"


def test_comparisons_of_devices_are_seen() -> None:
    assert device_comparisons('device.type == "cpu"') and device_comparisons('if "cuda" != self.device.type: pass')
    assert device_comparisons('(device or model.device).type in ("cpu", "mps")')
    assert device_comparisons("tensor.is_cuda")
    assert not device_comparisons("record = {'device': device.type}; rules = RULES[device.type]")


def test_every_package_imported_is_declared() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {requirement_name(text) for text in project["dependencies"]} | OPTIONAL_PACKAGES
    distributions = packages_distributions()
    for module in MODULES:
        for imported, line, _ in imports_of(module):
            package = imported.split(".")[0]
            if package == "nybble" or package in sys.stdlib_module_names:
                continue
            names = {name.lower().replace("_", "-") for name in distributions.get(package, [package])}
            assert names & declared, (
                f"{MODULES[module]}:{line} imports {package}, which pyproject.toml does not declare"
            )


def requirement_name(requirement: str) -> str:
    name = requirement
    for separator in "=<>~!;[ ":
        name = name.split(separator)[0]
    return name.lower().replace("_", "-")


def test_constraints_pin_every_declared_package() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (PROJECT / "constraints.txt").read_text(encoding="utf-8").split()
    pinned = {requirement_name(line) for line in lines if "==" in line}
    extras = [text for group in project["optional-dependencies"].values() for text in group]
    missing = {requirement_name(text) for text in (*project["dependencies"], *extras)} - pinned
    assert not missing
