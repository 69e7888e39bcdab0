"""Imports point one way, and what is optional stays optional (docs/design.md, "Layout").

The source is read, not run, so an import inside a function or under TYPE_CHECKING counts as well.
"""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pacevlm"

# From the bottom to the top: a part may import the parts of the layers before its own. Parts that share a layer do not
# import each other, but for the modules of the vocabulary.
VOCABULARY = frozenset(
    {
        "errors",
        "checks",
        "identity",
        "launch",
        "printing",
        "knobs",
        "mixture",
        "dataset_list",
        "config",
        "config_file",
        "images",
        "types",
    }
    | {"files", "artefact", "partial", "signals", "devices"}
)
LAYERS: tuple[frozenset[str], ...] = (
    VOCABULARY,
    frozenset({"models", "data", "latency", "controller"}),
    frozenset({"request"}),
    frozenset({"rollout"}),
    frozenset({"training"}),
    frozenset({"baselines"}),
    frozenset({"evaluation"}),
    frozenset({"pacer"}),
    frozenset({"pipeline"}),
    frozenset({"server", "lmms_eval"}),
    frozenset({"console", "options"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
# Nobody imports these, but that `python -m pacevlm` starts cli, and `pacevlm serve` the server.
ENTRY_POINTS = frozenset({"server", "lmms_eval", "cli", "__main__"})
STARTED = {("__main__", "cli"), ("cli", "server")}
BESIDE = ("recipes", "benchmarks", "scripts", "examples", "tests")  # they import the package, and it none of them

SERVER = frozenset(
    f"pacevlm.server.{module}"
    for module in (
        *("app", "asking", "chat", "edge", "listening", "metrics", "protocol", "ray_app", "refusals", "remote", "run"),
    )
)

# Optional libraries, and the only modules that may load them as they are imported. Everywhere else the import stands
# in the function that needs it.
OPTIONAL: dict[str, frozenset[str]] = {
    "matplotlib": frozenset({"pacevlm.evaluation.plots"}),
    "jinja2": frozenset({"pacevlm.evaluation.report"}),
    "tensorboard": frozenset(),
    "torch.utils.tensorboard": frozenset(),
    "numba": frozenset(
        f"pacevlm.models.molmoe.runtime.{module}"
        for module in ("cpu_loops", "cpu_kernels", "compiled_block", "compiled_adapter")
    ),
    "triton": frozenset(
        f"pacevlm.models.molmoe.runtime.{module}" for module in ("gpu_kernels", "gpu_experts", "triton_adapter")
    ),
    "sklearn": frozenset(),
    "datasets": frozenset(),
    "trl": frozenset(),
    "lmms_eval": frozenset({"pacevlm.lmms_eval", "pacevlm.lmms_eval.model"}),
    "ray": frozenset({"pacevlm.server.ray_app"}),
    "loguru": frozenset({"pacevlm.lmms_eval.model"}),
    **dict.fromkeys(("fastapi", "uvicorn", "starlette", "prometheus_client", "pydantic"), SERVER),
}


@dataclass(frozen=True)
class Import:
    """One imported module; `on_import` tells whether it loads as soon as the importing module does."""

    module: str
    line: int
    on_import: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def is_type_checking(node: ast.If) -> bool:
    return ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def imports_of(source: str, module: str, *, is_package: bool = False) -> list[Import]:
    """All imports of a module's source, relative ones resolved."""
    found: list[Import] = []

    def visit(node: ast.AST, on_import: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, on_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            package = module if is_package else module.rpartition(".")[0]
            base = importlib.util.resolve_name(name, package)
            found.extend(Import(f"{base}.{alias.name}", node.lineno, on_import) for alias in node.names)
        if isinstance(node, ast.If) and is_type_checking(node):
            for statement in node.body:
                visit(statement, False)
            for statement in node.orelse:
                visit(statement, on_import)
            return
        inside_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, on_import and not inside_function)

    visit(ast.parse(source), True)
    return found


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def part_of(module: str) -> str | None:
    """`pacevlm.models.adapter` belongs to the part `models`; None for the package itself."""
    return module.split(".")[1] if "." in module else None


def layer_of(part: str) -> int | None:
    return next((index for index, layer in enumerate(LAYERS) if part in layer), None)


def direction_faults(module: str, imports: list[Import]) -> Iterator[str]:
    """What in a module's imports breaks the layout, one sentence each."""
    importer = part_of(module)
    for item in imports:
        where = f"{module}:{item.line}"
        if item.module.partition(".")[0] in BESIDE:
            yield f"{where} imports {item.module}, which stands beside the package"
        if not is_within(item.module, "pacevlm"):
            continue
        imported = part_of(item.module)
        if imported in ENTRY_POINTS and importer != imported and (importer, imported) not in STARTED:
            yield f"{where} imports {imported}, which nobody imports"
        elif importer is None or imported == importer:
            continue  # the package itself offers the public names; a part may import itself
        elif imported is None or (imported not in SOURCE_PARTS and layer_of(imported) is None):
            name = item.module.removeprefix("pacevlm.")
            if name != "__version__":
                yield f"{where} imports {name} from the package itself; import it from the module that defines it"
        elif not may_import(importer, imported):
            yield f"{where}: {importer} must not import {imported}"


def may_import(importer: str, imported: str) -> bool:
    above, below = layer_of(importer), layer_of(imported)
    if above is None or below is None:
        return True  # reported once, by test_every_part_has_a_layer
    return below < above or (importer in VOCABULARY and imported in VOCABULARY)


def optional_faults(module: str, imports: list[Import]) -> Iterator[str]:
    for item in imports:
        for library, allowed in OPTIONAL.items():
            if item.on_import and module not in allowed and is_within(item.module, library):
                yield f"{module}:{item.line} loads {library} on import; import it in the function that needs it"


SOURCE_PARTS = frozenset(part for part in map(part_of, SOURCES) if part)


def all_imports() -> dict[str, list[Import]]:
    return {
        module: imports_of(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py")
        for module, path in SOURCES.items()
    }


def test_every_part_has_a_layer() -> None:
    homeless = sorted(part for part in SOURCE_PARTS if layer_of(part) is None)
    assert not homeless, f"give {homeless} a layer in LAYERS and in docs/design.md, or move them into a part"


def test_imports_point_down() -> None:
    faults = [fault for module, imports in all_imports().items() for fault in direction_faults(module, imports)]
    assert not faults, "\n".join(faults)


def test_no_module_loads_itself_through_others() -> None:
    graph: dict[str, set[str]] = {}
    for module, imports in all_imports().items():
        targets = {item.module for item in imports if item.on_import}
        # `from pacevlm.knobs import Knobs` names an attribute of a module, `from pacevlm import knobs` a module.
        modules = {t if t in SOURCES else t.rpartition(".")[0] for t in targets}
        graph[module] = {m for m in modules if m in SOURCES} - {module}
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"import cycle: {' <- '.join(error.args[1])}")


def test_optional_libraries_load_only_where_they_are_needed() -> None:
    faults = [fault for module, imports in all_imports().items() for fault in optional_faults(module, imports)]
    assert not faults, "\n".join(faults)


def run_python(program: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("module", ["pacevlm", "pacevlm.cli"])
def test_start_up_loads_no_optional_library(module: str) -> None:
    if module not in SOURCES:
        pytest.skip(f"{module} does not exist")
    program = (
        "import importlib, sys\n"
        "importlib.import_module(sys.argv[1])\n"
        "print(*[name for name in sys.argv[2:] if name in sys.modules])"
    )
    assert run_python(program, module, *OPTIONAL).split() == []


# Stands for an environment without the extras: the import system cannot find them.
IMPORT_WITHOUT_EXTRAS = """
import importlib, sys
hidden, modules = sys.argv[1].split(","), sys.argv[2].split(",")
class Without:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
for module in modules:
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(f"{module}: {error}")
"""


def test_every_other_module_imports_without_the_extras() -> None:
    exempt = frozenset().union(*OPTIONAL.values())
    modules = [m for m in SOURCES if m not in exempt and not m.endswith("__main__")]
    # torch itself depends on jinja2, so that one cannot be missing.
    hidden = sorted({library.partition(".")[0] for library in OPTIONAL} - {"torch", "jinja2"})
    assert run_python(IMPORT_WITHOUT_EXTRAS, ",".join(hidden), ",".join(modules)) == ""


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("pacevlm.latency.estimator", "from pacevlm.models.adapter import Adapter", "latency must not import models"),
        ("pacevlm.latency.estimator", "import pacevlm.data.digits", "latency must not import data"),
        ("pacevlm.latency.estimator", "from ..controller import policy", "latency must not import controller"),
        (
            "pacevlm.models.adapter",
            "def f():\n    from pacevlm.rollout import engine",
            "models must not import rollout",
        ),
        ("pacevlm.rollout.engine", "if TYPE_CHECKING:\n    import pacevlm.training.grpo", "must not import training"),
        ("pacevlm.knobs", "from pacevlm.models import adapter", "knobs must not import models"),
        ("pacevlm.training.trainer", "from pacevlm.evaluation import sweep", "training must not import evaluation"),
        ("pacevlm.pacer", "from pacevlm.cli import main", "imports cli, which nobody imports"),
        ("pacevlm.pacer", "from pacevlm.server import app", "imports server, which nobody imports"),
        ("pacevlm", "from pacevlm.cli import main", "imports cli, which nobody imports"),
        ("pacevlm.training.trainer", "from pacevlm import Pacer", "imports Pacer from the package itself"),
        ("pacevlm.models.embedded", "from recipes.embedded_model import trainer", "which stands beside the package"),
        ("pacevlm.cli", "def f():\n    import recipes", "which stands beside the package"),
    ],
)
def test_a_wrong_direction_is_found(module: str, source: str, fault: str) -> None:
    (found,) = direction_faults(module, imports_of(source, module, is_package=module == "pacevlm"))
    assert fault in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pacevlm.knobs", "from pacevlm.errors import KnobError"),
        ("pacevlm.models.adapter", "from pacevlm.models.molmoe import MolmoE\nfrom . import elastic"),
        ("pacevlm.evaluation.sweep", "from pacevlm.baselines import oracle\nfrom pacevlm.models import adapter"),
        ("pacevlm.cli", "from pacevlm.pacer import Pacer\nfrom pacevlm import __version__"),
        ("pacevlm", "from pacevlm.pacer import Pacer"),
    ],
)
def test_a_right_direction_is_no_fault(module: str, source: str) -> None:
    assert list(direction_faults(module, imports_of(source, module, is_package=module == "pacevlm"))) == []


@pytest.mark.parametrize(
    ("source", "num_faults"),
    [
        ("import matplotlib.pyplot as plt", 1),
        ("from torch.utils.tensorboard import SummaryWriter", 1),
        ("from torch.utils import tensorboard", 1),
        ("try:\n    import sklearn\nexcept ImportError:\n    sklearn = None", 1),
        ("class Plot:\n    import matplotlib", 1),
        ("def plot():\n    import matplotlib", 0),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import matplotlib", 0),
        ("import torch.utils.data", 0),
    ],
)
def test_an_optional_library_on_import_is_found(source: str, num_faults: int) -> None:
    assert len(list(optional_faults("pacevlm.training.trainer", imports_of(source, "pacevlm.training.trainer")))) == (
        num_faults
    )
    if "matplotlib" in source:
        assert not list(optional_faults("pacevlm.evaluation.plots", imports_of(source, "pacevlm.evaluation.plots")))
