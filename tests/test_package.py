"""The package as a whole: what importing it costs and gives, in which order its rooms and files lean on each other."""

import ast
import functools
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hf_transmiter


ROOT = Path(hf_transmiter.__file__).parent
# A room may import those before it, and itself. The two files before the rooms are everybody's.
ORDER = (
    *("settings", "algebra"),
    *("hub", "encoders", "sandbox", "data", "tuners", "training", "method", "evaluation", "bench", "cli"),
    "__main__",
)
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py" and "assets" not in path.parts)
# It went up twice, from 18,400 for one way to write, to read pictures and to check what is passed, and from 20,170 for
# embeddings that come from elsewhere, worker processes and indexes; from here it is to go down: whoever raises it says
# here what for.
LINES, LONGEST, INSIDE = 21_100, 500, 20
names = [str(path.relative_to(ROOT)) for path in FILES]
every_file = pytest.mark.parametrize("path", FILES, ids=names)


@pytest.mark.parametrize("name", hf_transmiter.__all__)
def test_public_names(name):
    assert getattr(hf_transmiter, name).__doc__
    assert name in vars(hf_transmiter)  # looked up once
    assert name in dir(hf_transmiter)


def test_unknown_names():
    with pytest.raises(AttributeError, match="has no attribute 'Clip'"):
        _ = hf_transmiter.Clip


def test_the_front_door_is_narrow():
    assert len(hf_transmiter.__all__) <= 26  # 24 until embeddings could come from elsewhere: `Embed`, `FeatureTable`


def test_importing_is_cheap_and_any_name_registers_the_adapters():
    """In a process of its own: one import that costs nothing, and PEFT knows the methods once a name is used."""
    code = """
import sys, hf_transmiter
print([m for m in ("torch", "peft", "transformers", "datasets") if m in sys.modules])
from hf_transmiter import Anchors
from peft import PeftConfig
print(PeftConfig.from_peft_type(peft_type="TRANSMITER", class_names=["cat"]).class_names)
print(PeftConfig.from_peft_type(peft_type="COOP").n_ctx)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["[]", "['cat']", "16"]


def test_with_peft_alone_the_adapters_are_one_import_away():
    code = (
        "import hf_transmiter.tuners; from peft import PeftConfig; print(PeftConfig.from_peft_type(peft_type='COOP'))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "CoOpConfig" in result.stdout


@functools.cache
def imports(path: Path) -> list[tuple[int, str, bool]]:
    """Absolute names of what a file imports, wherever that stands: the line, the name, and whether in a function."""
    package = ("hf_transmiter", *path.relative_to(ROOT).parent.parts)
    found = []

    def visit(nodes, inside):
        for node in nodes:
            if isinstance(node, ast.Import):
                found.extend((node.lineno, alias.name, inside) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = list(package[: len(package) - node.level + 1]) if node.level else []
                base += node.module.split(".") if node.module else []
                found.extend((node.lineno, ".".join([*base, alias.name]), inside) for alias in node.names)
            else:
                within = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
                for name in ("body", "orelse", "finalbody", "handlers"):
                    visit(getattr(node, name, []), within)

    visit(ast.parse(path.read_text()).body, False)
    return found


@functools.cache
def file_of(name: str) -> Path | None:
    """The file of this package that an absolute name comes from, without its `__init__`s, which hold nothing."""
    parts = name.split(".")
    if parts[0] != "hf_transmiter":
        return None
    for length in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[1:length])
        for path in (place.with_suffix(".py"), place / "__init__.py"):
            if path.is_file() and path != ROOT / "__init__.py":
                return path
    return None


@every_file
def test_imports_point_down(path):
    """Type-checking imports and imports inside functions count, too."""
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert own in ORDER, f"say in ORDER where {own} stands"
    for line, name, _ in imports(path):
        other = file_of(name)
        if other is None:
            continue
        room = other.relative_to(ROOT).parts[0].removesuffix(".py")
        assert ORDER.index(room) <= ORDER.index(own), f"{path.name}:{line}: {own} imports {room}"


def test_there_is_no_circle():
    graph = {path: {file_of(name) for _, name, _ in imports(path)} - {None, path} for path in FILES}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the files


def test_imports_inside_functions_are_few_and_have_a_reason():
    found = {}
    for path in FILES:
        lines = path.read_text().splitlines()
        for number in sorted({line for line, _, inside in imports(path) if inside}):
            said = "#" in lines[number - 1] or lines[number - 2].strip().startswith("#")
            found[f"{path.relative_to(ROOT)}:{number}"] = said
    assert len(found) <= INSIDE, f"{len(found)} imports inside functions: {', '.join(found)}"
    assert all(found.values()), [place for place, said in found.items() if not said]


@every_file
def test_a_long_file_says_why(path):
    text = path.read_text()
    lines = text.count("\n")
    assert lines <= LONGEST or "One file because" in (ast.get_docstring(ast.parse(text)) or ""), f"{lines} lines"


def test_the_package_stays_small():
    total = sum(path.read_text().count("\n") for path in [*FILES, ROOT / "__init__.py"])
    assert total <= LINES, f"{total} lines of Python in the package, {LINES} are agreed"


@every_file
def test_rooms_re_export_nothing(path):
    if path.name != "__init__.py" or path.parent.name in ("tuners", "sandbox") or "tuners" in path.parts:
        return
    assert not imports(path) and ast.get_docstring(ast.parse(path.read_text()))


@every_file
def test_the_library_of_an_extra_is_imported_where_it_is_used(path):
    extras = ("open_clip", "gradio", "matplotlib", "ray", "pyspark")
    tree = ast.parse(path.read_text())
    at_top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    at_top = [node for node in at_top if not getattr(node, "level", 0)]
    names = [getattr(node, "module", None) or node.names[0].name for node in at_top]
    assert not [name for name in names if name.split(".")[0] in extras]


@every_file
def test_what_no_module_does(path):
    for _, name, _ in imports(path):
        assert name.split(".")[0] not in ("torchvision", "timm", "pickle", "dill", "joblib")
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save"), ("pickle", "load")}, where
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant) and node.value.value is False, where
        if isinstance(node, ast.keyword) and node.arg == "weights_only":
            assert isinstance(node.value, ast.Constant) and node.value.value is True, where
