"""The rooms and who may import whom, as an executable picture."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mctd_diffusers

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mctd_diffusers"

# A module imports from rooms further left only; rooms side by side do not see each other.
ORDER = [
    {"errors"},
    {"files", "hub", "imports", "search"},
    {"denoising"},
    {"models", "rewards"},
    {"results"},
    {"calls"},
    {
        "arguments",
        "callbacks",
        "estimating",
        "outputs",
        "pipeline_folder",
        "replaying",
        "saved_calls",
    },
    {"pipeline"},
    {"families", "processes"},
    {"trajectories", "evaluation", "viewing"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if "embedded" not in path.parts
)

TORCH_FREE = [name for name in MODULES if name.split(".")[1:2] in (["errors"], ["search"])]
PIPELINES = sorted((ROOT / "pipelines").glob("*.py"))
SCRIPTS = sorted((ROOT / "training").glob("[!_]*.py"))


def path_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def room_of(module: str) -> str:
    return [*module.split("."), ""][1]


def imports(path: Path) -> Iterator[str]:
    """Every module that `path` imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: line {node.lineno} imports relatively"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("module", [name for name in MODULES if room_of(name)])
def test_module_imports_from_rooms_further_left_only(module: str) -> None:
    room = room_of(module)
    for imported in imports(path_of(module)):
        other = room_of(imported)
        if imported.startswith("mctd_diffusers.") and other in RANK and other != room:
            assert RANK[other] < RANK[room], f"{module} imports {imported}"


@pytest.mark.parametrize("module", [name for name in MODULES if room_of(name)])
def test_every_room_has_its_place_in_the_order(module: str) -> None:
    assert room_of(module) in RANK, f"{module}: say in ORDER where {room_of(module)} stands"


@pytest.mark.parametrize(
    "module", [name for name in MODULES if room_of(name) in {"errors", "search"}]
)
def test_search_imports_numpy_at_most(module: str) -> None:
    heavy = {"torch", "diffusers", "transformers", "accelerate", "matplotlib", "PIL", "jaxtyping"}
    assert not heavy & {name.split(".")[0] for name in imports(path_of(module))}


def test_running_the_search_loads_no_torch() -> None:
    loaded = "print(*({'torch', 'diffusers'} & set(sys.modules)))"
    code = f"import sys, {', '.join(TORCH_FREE)}; {loaded}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


@pytest.mark.parametrize(
    "module",
    [name for name in MODULES if RANK.get(room_of(name), 99) <= RANK["families"]],
)
def test_the_gold_judge_is_unseen_by_search_and_reward(module: str) -> None:
    # By name too: a string for importlib would do as well as an import.
    text = path_of(module).read_text("utf-8")
    assert not any(
        name.startswith("mctd_diffusers.evaluation") for name in imports(path_of(module))
    )
    assert "SceneJudge" not in text
    assert "mctd_diffusers.evaluation" not in text.replace("`mctd_diffusers.evaluation", "")


@pytest.mark.parametrize(
    "module", [name for name in MODULES if room_of(name) not in {"cli", "__main__"}]
)
def test_the_package_does_not_print(module: str) -> None:
    tree = ast.parse(path_of(module).read_text("utf-8"))
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not any(isinstance(call, ast.Name) and call.id == "print" for call in calls)


@pytest.mark.parametrize("module", [name for name in MODULES if room_of(name) != "__main__"])
def test_every_module_imports(module: str) -> None:
    importlib.import_module(module)


def test_public_names_are_sorted_and_exact() -> None:
    names = mctd_diffusers.__all__
    # Constants, classes, functions, as the linter sorts them.
    assert names == sorted(names, key=lambda name: (not name.isupper(), name[0].islower(), name))
    assert set(names) == {*mctd_diffusers._MODULES, "EMBEDDED_MODEL"}
    for name, module in mctd_diffusers._MODULES.items():
        defined = getattr(mctd_diffusers, name)
        assert defined.__module__ == f"mctd_diffusers.{module}", f"{name} is not defined there"
    assert set(names) <= set(dir(mctd_diffusers))


def test_public_names_are_seen_by_type_checkers_too() -> None:
    declared = {
        alias.name: node.module
        for block in ast.parse((PACKAGE / "__init__.py").read_text("utf-8")).body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    table = {name: f"mctd_diffusers.{module}" for name, module in mctd_diffusers._MODULES.items()}
    assert declared == table


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'MCTDPipelin'"):
        _ = mctd_diffusers.MCTDPipelin


@pytest.mark.parametrize(
    "path", sorted((ROOT / "pipelines").glob("*.py")), ids=lambda path: path.name
)
def test_pipeline_file_is_a_single_import(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    statements = [node for node in tree.body if not isinstance(node, ast.Expr)]
    assert len(statements) == 1
    assert isinstance(statements[0], ast.ImportFrom)
    assert len(statements[0].names) == 1
    assert (statements[0].module or "").startswith("mctd_diffusers.families.")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "training").glob("*.py")), ids=lambda path: path.name
)
def test_training_script_imports_no_sibling(path: Path) -> None:
    siblings = {sibling.stem for sibling in path.parent.glob("*.py")} | {"training"}
    for imported in imports(path):
        assert imported.split(".")[0] not in siblings
        assert not imported.startswith("mctd_diffusers._training")


@pytest.mark.parametrize("module", MODULES)
def test_every_protocol_can_be_checked_while_tests_run(module: str) -> None:
    for node in ast.walk(ast.parse(path_of(module).read_text("utf-8"))):
        if isinstance(node, ast.ClassDef) and "Protocol" in map(ast.unparse, node.bases):
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            assert "runtime_checkable" in decorators, f"{module}.{node.name}: @runtime_checkable"


@pytest.mark.parametrize("room", ["mctd_diffusers", "training", "pipelines", "tests", "docs"])
def test_the_project_stands_alone(room: str) -> None:
    # Names of notes that whoever installs the project does not have.
    elsewhere = re.compile(r"\.\./shared|DESIGN|(?<!-)\b(methods|diffusers|peers|style)\.md")
    for path in [*(ROOT / room).rglob("*.py"), *(ROOT / room).rglob("*.md")]:
        if path != Path(__file__):
            assert not elsewhere.search(path.read_text("utf-8")), path.relative_to(ROOT)
