"""The package as a whole: what importing it costs and gives, in which order its modules lean on each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_transmiter


ROOT = Path(hf_transmiter.__file__).parent
# A module may import those before it. Inside functions anything goes: that is where a cycle is broken on purpose.
ORDER = (
    *("settings", "rules", "trust", "files", "hub"),
    *("provenance", "scores", "card_text", "cards"),
    *("splits", "vocabulary", "anchors", "families"),
    *("open_clip_model", "fingerprint", "safe_weights", "backbone"),
    *("feature_table", "solvers", "calibration", "transfers", "tuners"),
    *("card_text", "card_facts", "card_metadata", "cards", "sharing", "classifier"),
    *("features", "draws", "augmentation", "training", "answers", "prompt_tuning"),
    *(
        "teachers",
        "extraction",
        "moments",
        "bridge_files",
        "bridge",
        "transferring",
        "label_tuning",
        "attaching",
        "baselines",
    ),
    *("evaluation", "reliability", "comparison_task", "methods", "comparison"),
    "knowledge",
    "drift",
    *(
        "catalog",
        "dataset_specs",
        "figures",
        *("knowledge_text", "knowledge_figures"),
        "report",
        "retraining",
        "compatibility",
        "upgrade_studies",
        *("protocols", "bench_config", "bench_plan", "bench_cells", "bench_figures", "bench_report", "bench"),
        "download_sizes",
        "preparing",
        "image_classification",
        "sandbox",
        "demo",
        "app",
        "cli_reporting",
        "cli_options",
        "cli_arguments",
        "cli_bench",
        "cli_transfer",
        "cli_compare",
        "cli_upgrade",
        "cli_hub",
        "cli_app",
        "cli",
        "__main__",
    ),
)
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py" and "assets" not in path.parts)
names = [str(path.relative_to(ROOT)) for path in FILES]
every_file = pytest.mark.parametrize("path", FILES, ids=names)


@pytest.mark.parametrize("name", hf_transmiter.__all__)
def test_public_names(name):
    assert getattr(hf_transmiter, name).__doc__
    assert name in vars(hf_transmiter)  # looked up once


def test_unknown_names():
    with pytest.raises(AttributeError, match="has no attribute 'Clip'"):
        _ = hf_transmiter.Clip


def test_importing_is_cheap():
    code = """
import sys, hf_transmiter
print([m for m in ("torch", "peft", "transformers", "datasets") if m in sys.modules])
"""
    assert in_a_process_of_its_own(code) == ["[]"]


@pytest.mark.parametrize("first", ["from hf_transmiter import DualEncoder", "import hf_transmiter.tuners"])
def test_what_registers_the_adapters(first):
    """Any name of the package, or with PEFT alone its tuners."""
    code = f"""
{first}
from peft import PeftConfig
print(PeftConfig.from_peft_type(peft_type="TRANSMITER", class_names=["cat"]).class_names)
print(PeftConfig.from_peft_type(peft_type="COOP").n_ctx)
"""
    assert in_a_process_of_its_own(code) == ["['cat']", "16"]


def in_a_process_of_its_own(code: str) -> list[str]:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def _is_type_checking(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def top_imports(path: Path) -> list[tuple[int, str]]:
    """Absolute names of the modules imported when `path` is, with their lines."""
    package = ("hf_transmiter", *path.relative_to(ROOT).parent.parts)
    found = []

    def visit(nodes):
        for node in nodes:
            if isinstance(node, ast.Import):
                found.extend((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = list(package[: len(package) - node.level + 1]) if node.level else []
                base += node.module.split(".") if node.module else []
                found.extend((node.lineno, ".".join([*base, alias.name])) for alias in node.names)
            elif (
                isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
                or isinstance(node, ast.If)
                and _is_type_checking(node)
            ):
                continue
            else:
                for name in ("body", "orelse", "finalbody", "handlers"):
                    visit(getattr(node, name, []))

    visit(ast.parse(path.read_text()).body)
    return found


@every_file
def test_imports_point_upward(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert own in ORDER, f"say in ORDER where {own} stands"
    for line, name in top_imports(path):
        parts = name.split(".")
        if parts[0] != "hf_transmiter":
            continue
        module = parts[1] if len(parts) > 1 else ""
        assert module in ORDER, f"{path.name}:{line} imports {name}: name the module"
        assert module == own or ORDER.index(module) < ORDER.index(own), f"{path.name}:{line}: {own} imports {module}"
        if module == "sandbox":
            assert own in ("sandbox", "demo", "cli"), f"{path.name}:{line}: only the command line uses the sandbox"


@every_file
def test_the_library_of_an_extra_is_imported_where_it_is_used(path):
    assert not [name for _, name in top_imports(path) if name.split(".")[0] in ("open_clip", "gradio", "matplotlib")]


@every_file
def test_what_no_module_does(path):
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        imported = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported = [node.module]
        for name in imported:
            assert name.split(".")[0] not in ("torchvision", "timm", "pickle", "dill", "joblib"), where
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save"), ("pickle", "load")}, where
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant) and node.value.value is False, where
        if isinstance(node, ast.keyword) and node.arg == "weights_only":
            assert isinstance(node.value, ast.Constant) and node.value.value is True, where
