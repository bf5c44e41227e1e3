"""Rules of the layout that no linter knows."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_rl"
FILES = sorted(PACKAGE.rglob("*.py"))
DOORS = sorted((ROOT / "tools").rglob("*.py"))
CONFIGS = sorted(PACKAGE.glob("*/config.py"))

# A room may import itself and the ones after it, never the ones before.
ROOMS = [
    "__main__", "commands", "doctor", "session", "plan", "overlap", "auto_layout", "choose",
    "auto_engine", "rehearsal", "grade", "sampling", "build", "build_rollouts", "loop", "run",
    "recorder", "input_report", "preflight", "fit", "memory", "separate", "config",
    "recipe", "explain", "checkpoint", "conversion", "rollout", "evaluation", "policy", "megatron",
    "weights", "batching", "prompts", "reward", "algorithms", "objectives", "metrics", "parallel",
    "ops", "platforms", "types", "settings", "files", "references", "errors", "collector",
]  # fmt: skip

# What only somebody knows who has read Megatron-Core: names of its classes, of its marks on
# parameters, and of the keys of its checkpoints.
MEGATRON_NAMES = re.compile(
    r"\b(?:GPTModel|HybridModel|TransformerConfig|parallel_state|finalize_model_grads"
    r"|sharded_state_dict\w*|param_state\w*|param_groups|chained_optimizers|main_grad"
    r"|grad_added_to_main_grad|zero_out_wgrad|zero_grad_buffer|_extra_state|common_backend"
    r"|te_general_gemm|maybe_move_tensor_to_cpu|model_param_group_index_map|HAVE_APEX_OR_TE"
    r"|disable_jit_fuser|fp32_output|_postprocess)\b"
    r"|chunks\[-1\]|\.config\.sequence_parallel"
)

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 75
MAX_CONFIG_LINES = 150

# Homes, scratch folders and work trees of one machine; a path in a container or a system is fine.
MACHINE_PATH = re.compile(r"/(?:root|home/\w+|Users/\w+|work/(?:main|shared)|tmp/dev)(?:/|\b)")


def test_every_room_is_in_the_order():
    rooms = {room_of(path) for path in FILES} - {"__init__"}
    assert rooms <= set(ROOMS), f"put into ROOMS: {sorted(rooms - set(ROOMS))}"


def test_rooms_import_downwards():
    upward = [
        f"{path.relative_to(PACKAGE)}:{line} imports {target}"
        for path in FILES
        for line, target in rooms_imported(path.read_text())
        if ROOMS.index(target) < ROOMS.index(room_of(path))
    ]
    assert not upward, "\n".join(upward)


def test_no_files_import_each_other_in_a_circle():
    graph = {module_of(path): files_imported(path.read_text()) for path in FILES}
    circles = circles_of(graph)
    assert not circles, "\n".join(" -> ".join(circle) for circle in circles)


def test_a_circle_is_found_wherever_its_imports_stand():
    a = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from megatron_rl.ops import b\n"
    b = "def f():\n    import megatron_rl.ops.c\n"
    c = "from megatron_rl.ops.a import thing\nfrom megatron_rl.ops.d import other\n"
    sources = {"a": a, "b": b, "c": c, "d": "import torch\n"}
    graph = {f"megatron_rl.ops.{name}": files_imported(text) for name, text in sources.items()}
    assert [set(circle) for circle in circles_of(graph)] == [
        {"megatron_rl.ops.a", "megatron_rl.ops.b", "megatron_rl.ops.c"}
    ]


def test_every_form_of_import_is_seen():
    source = (
        "import megatron_rl.policy.policy\n"
        "from megatron_rl import loop\n"
        "def f():\n"
        "    from megatron_rl.types import Rollout\n"
        "from megatron_rl import __version__\n"
        "import megatron_rl._C\n"
        "from megatron.core import tensor_parallel\n"
    )
    seen = sorted(rooms_imported(source))
    assert seen == [(1, "policy"), (2, "loop"), (4, "types")]


def test_torch_cuda_is_spelled_only_in_platforms():
    """And where Megatron-Core's own spelling of it is rewritten."""
    rewrites = PACKAGE / "megatron" / "on_cpu.py"
    spellers = [
        str(path.relative_to(PACKAGE))
        for path in FILES
        if room_of(path) != "platforms" and path != rewrites and "torch.cuda" in path.read_text()
    ]
    assert not spellers, "\n".join(spellers)


def test_megatron_core_is_imported_only_behind_the_door():
    importers = [
        f"{path.relative_to(PACKAGE)}:{line} imports {name}"
        for path in FILES
        if room_of(path) != "megatron"
        for line, name in modules_imported(path.read_text())
        if name.partition(".")[0] == "megatron"
    ]
    assert not importers, "\n".join(importers)


def test_only_what_trains_needs_megatron_core_at_its_import():
    """It has to be entered first, so a file that is imported earlier must not bring it along."""
    trains = {"megatron", "policy", "checkpoint", "build", "run", "loop", "__main__"}
    trains |= {"build_rollouts", "sampling"}
    others = [module_of(path) for path in FILES if room_of(path) not in trains]
    code = (
        "import importlib, sys\n"
        "for module in sys.argv[1:]:\n"
        "    importlib.import_module(module)\n"
        "    assert 'megatron.core' not in sys.modules, module\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *others], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_form_of_import_of_megatron_core_is_seen():
    source = (
        "import megatron.core\n"
        "from megatron import core\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n"
        "    from megatron.core.transformer import TransformerConfig\n"
        "def f():\n"
        "    import torch, megatron.training as training\n"
        "import megatron_rl.megatron.model\n"
    )
    found = [line for line, name in modules_imported(source) if name.startswith("megatron")]
    assert sorted(found) == [1, 2, 5, 7, 8]
    behind = [line for line, name in modules_imported(source) if name.split(".")[0] == "megatron"]
    assert sorted(behind) == [1, 2, 5, 7]


def test_private_names_of_megatron_core_are_spelled_only_behind_the_door():
    found = sorted(
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in FILES
        if room_of(path) != "megatron"
        for name in MEGATRON_NAMES.findall(path.read_text())
    )
    assert not found, "\n".join(found)


def test_functions_fit_a_screen():
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in FILES + DOORS
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert not long, "\n".join(long)


def test_files_stay_small():
    large = [
        f"{path.relative_to(ROOT)}: {lines} lines"
        for path in FILES + DOORS
        if (lines := path.read_text().count("\n")) > MAX_FILE_LINES
    ]
    assert not large, "\n".join(large)


def test_the_settings_of_a_room_are_read_at_one_sitting():
    long = [
        f"{path.relative_to(ROOT)}: {lines} lines"
        for path in CONFIGS
        if (lines := path.read_text().count("\n")) > MAX_CONFIG_LINES
    ]
    assert not long, "\n".join(long)


def test_settings_need_no_torch():
    """So that faults of a recipe show at once, on every rank and on a laptop."""
    rooms = [f"megatron_rl.{path.parent.name}.config" for path in CONFIGS]
    code = (
        "import importlib, sys\n"
        "for module in sys.argv[1:]:\n"
        "    importlib.import_module(module)\n"
        "    assert 'torch' not in sys.modules, module\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "megatron_rl.config", *rooms],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_an_installed_package_has_its_command_and_every_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    module, _, function = project["project"]["scripts"]["megatron-rl"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    others = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.*")
        if path.is_file() and path.suffix not in (".py", ".pyc", ".so")
    ]
    assert sorted(others) == project["tool"]["setuptools"]["package-data"]["megatron_rl"]


def test_init_files_are_empty():
    filled = [
        str(path.relative_to(PACKAGE))
        for path in FILES
        if path.name == "__init__.py" and path.read_text()
    ]
    assert not filled, "\n".join(filled)


def test_no_tracked_file_names_a_path_of_one_machine():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    tracked = [ROOT / name for name in listing.stdout.decode().split("\0") if name]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in tracked
        if path.is_file()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert not found, "\n".join(found)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rooms_imported(source: str) -> Iterator[tuple[int, str]]:
    for line, name in modules_imported(source):
        package, _, rest = name.partition(".")
        room = rest.partition(".")[0]
        if package == "megatron_rl" and room in ROOMS:  # _C and the like are no rooms
            yield line, room


def modules_imported(source: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, wherever it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "megatron_rl":
            yield from ((node.lineno, f"megatron_rl.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or ""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def files_imported(source: str) -> set[str]:
    """Names that may be modules of ours, those under TYPE_CHECKING and in functions among them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.startswith("megatron_rl.")}


def circles_of(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of two or more modules each of which reaches all others; and self-importers."""

    def reached(start: str) -> set[str]:
        seen, left = set(), [start]
        while left:
            for name in graph.get(left.pop(), set()) & graph.keys():
                if name not in seen:
                    seen.add(name)
                    left.append(name)
        return seen

    reach = {name: reached(name) for name in graph}
    circles = {
        tuple(sorted(other for other in reach[name] if name in reach[other]))
        for name in graph
        if name in reach[name]
    }
    return [list(circle) for circle in sorted(circles)]
