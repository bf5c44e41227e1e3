"""One way from arguments to an exit code, for every command and every door in tools/."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rl.commands import main as main_file
from megatron_rl.commands import recipe
from megatron_rl.commands.main import COMMANDS, main
from megatron_rl.errors import ConfigErrors, InputError

ROOT = Path(__file__).parents[3]
DOORS = {  # script: the command that it is
    "convert_hf_to_megatron": ("convert", "to-megatron"),
    "convert_megatron_to_hf": ("convert", "to-hf"),
    "verify_checkpoint": ("verify",),
    "prepare_data": ("prepare",),
    "plot_runs": ("plot",),
    "show_rollouts": ("show",),
}


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def fails_with(monkeypatch, error: BaseException) -> None:
    def run(_options):
        raise error

    monkeypatch.setattr(recipe, "run", run)


HELP = """
import contextlib, io, sys
from megatron_rl.commands.main import COMMANDS, main
directions = [["convert", "to-hf"], ["convert", "to-megatron"]]
for arguments in ([], *([name] for name in COMMANDS), *directions):
    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(told):
            main([*arguments, "--help"])
    except SystemExit as end:
        assert end.code == 0, arguments
    assert " ".join(["usage: megatron-rl", *arguments]) in told.getvalue(), told.getvalue()
slow = {"torch", "transformers", "datasets", "vllm", "matplotlib", "megatron"} & set(sys.modules)
assert not slow, slow
"""


def test_help_of_every_command_imports_nothing_slow():
    done = python(HELP)
    assert done.returncode == 0, done.stderr


def test_a_recipe_with_a_fault_imports_nothing_slow(tmp_path):
    (tmp_path / "recipe.yaml").write_text("run: {output_dir: out, num_iterations: 0}\n")
    code = (
        "import sys; from megatron_rl.commands.main import main\n"
        "codes = [main([name, sys.argv[1]]) for name in ('train', 'evaluate', 'plan')]\n"
        "assert codes == [2, 2, 2] and 'torch' not in sys.modules, codes"
    )
    done = python(code, str(tmp_path / "recipe.yaml"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("megatron-rl: error: ") == 3


def test_the_front_help_lists_commands_and_exit_codes(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    told = capsys.readouterr().out
    assert all(f"\n    {name} " in told for name in COMMANDS)
    assert "\n  130  stopped by Ctrl-C" in told


@pytest.mark.parametrize("script", DOORS)
def test_a_door_has_the_options_of_its_command(script):
    """As its help lists them; run from elsewhere, as a script."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / f"{script}.py"), "--help"],
        cwd="/",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(" ".join(["usage: megatron-rl", *DOORS[script], "[-h]"]))


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("there"), 2, "megatron-rl: error: there\n"),
        (
            ConfigErrors(["a.b=1: no"]),
            2,
            "megatron-rl: error: 1 problem in the configuration:\n  - a.b=1: no\n",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "out"),
            2,
            "megatron-rl: error: [Errno 13] Permission denied: 'out'\n",
        ),
        (
            KeyboardInterrupt(),
            130,
            "megatron-rl: stopped; the same command goes on from the newest checkpoint\n",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_message_and_a_code(monkeypatch, capsys, error, code, said):
    fails_with(monkeypatch, error)
    assert main(["train", "recipe.yaml"]) == code
    assert capsys.readouterr().err == said
    monkeypatch.setenv("RANK", "1")  # every rank finds the same; the first says it
    assert main(["train", "recipe.yaml"]) == code
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("local_rank", "waited"), [("0", []), ("1", [main_file.WAIT_FOR_FIRST_S])])
def test_the_first_rank_of_a_node_tells_torchrun_first(monkeypatch, tmp_path, local_rank, waited):
    """The others leave it the time to, and then torchrun has ended them."""
    told, slept = tmp_path / "error.json", []

    def fail(options):
        raise InputError("no such data")

    def sleep(seconds):
        slept.append(seconds)
        assert not told.exists()

    monkeypatch.setattr(recipe, "run", fail)
    monkeypatch.setattr(main_file.time, "sleep", sleep)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(told))
    assert main(["train", "recipe.yaml"]) == 2
    assert (slept, "no such data" in told.read_text()) == (waited, True)


def test_a_command_that_starts_over_promises_nothing(monkeypatch, capsys):
    fails_with(monkeypatch, KeyboardInterrupt())
    assert main(["plan", "recipe.yaml"]) == 130
    assert capsys.readouterr().err == "megatron-rl: stopped\n"


@pytest.mark.parametrize("error", [ZeroDivisionError("ours"), OSError(errno.EIO, "the disk")])
def test_a_fault_of_ours_keeps_its_traceback(monkeypatch, error):
    fails_with(monkeypatch, error)
    with pytest.raises(type(error)):
        main(["train", "recipe.yaml"])


def test_a_reader_that_has_enough_is_no_error():
    listing = subprocess.Popen(
        [sys.executable, "-u", "-m", "megatron_rl", "settings"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    listing.stdout.close()  # before the first line
    assert listing.stderr.read() == b""
    assert listing.wait() == 0


def test_a_fault_of_ours_exits_with_one():
    code = (
        "import sys; from megatron_rl.commands import main as file, recipe\n"
        "recipe.run = lambda options: 1 / 0\n"
        "sys.exit(file.main(['train', 'recipe.yaml']))"
    )
    done = python(code)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "are required: COMMAND"),
        (["trian", "r.yaml"], "invalid choice: 'trian'"),
        (["train"], "are required: recipe"),
        (["train", "r.yaml", "--fast"], "unrecognized arguments: --fast"),
        (["show", "run", "another"], "unrecognized arguments: another"),
        (
            ["convert", "to-hf", "--megatron", "a", "--output", "b", "c"],
            "unrecognized arguments: c",
        ),
        (["convert"], "are required: DIRECTION"),
        (
            ["prepare", "--dataset", "a", "--output", "b", "--max-problems", "0"],
            "must be at least 1",
        ),
    ],
)
def test_arguments_that_cannot_be_are_told_in_the_same_form(capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megatron-rl: error: ")
    assert said in line


def test_overrides_come_as_they_were_given(monkeypatch):
    seen = []
    monkeypatch.setattr(recipe, "run", lambda options: seen.append(options.overrides) or 0)
    assert main(["train", "r.yaml", "run.seed=1", "run.seed=2"]) == 0
    assert seen == [["run.seed=1", "run.seed=2"]]


def test_every_file_of_a_command_has_what_main_calls():
    for name in {file for file, _ in COMMANDS.values()}:
        command = __import__(f"megatron_rl.commands.{name}", fromlist=["run"])
        assert callable(command.add_options), name
        assert callable(command.run), name
    assert main_file.GOES_ON.keys() <= COMMANDS.keys()
