"""What can be known of the image without building it."""

import fnmatch
import json
import re
from pathlib import Path

import pytest

from megatron_rl.commands.main import _parse
from megatron_rl.config import load_config

ROOT = Path(__file__).parents[3]
LINES = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
STEPS = [
    tuple(line.split(maxsplit=1))
    for line in LINES.replace("\\\n", " ").splitlines()
    if line.strip()
]
IGNORED = (ROOT / ".dockerignore").read_text().split()


def stages():
    """Name -> its steps, in order."""
    found, name = {}, None
    for word, rest in STEPS:
        if word == "FROM":
            name = rest.split(" AS ")[1]
            found[name] = []
        elif name is not None:
            found[name].append((word, rest))
    return found


def test_bases_are_named_once_where_a_digest_can_replace_them():
    bases = dict(rest.split("=", 1) for word, rest in STEPS if word == "ARG")
    used = [re.fullmatch(r"\$\{(\w+)\} AS \w+", rest)[1] for word, rest in STEPS if word == "FROM"]
    assert sorted(used) == sorted(bases) == ["DEVEL_BASE", "RUNTIME_BASE"]
    assert all(re.fullmatch(r"nvidia/cuda[:@][\w.:-]*\d[\w.:-]*", base) for base in bases.values())
    assert "devel" not in bases["RUNTIME_BASE"]


def test_what_is_copied_is_there_and_sent_to_the_builder():
    for name, steps in stages().items():
        for word, rest in steps:
            *sources, _ = rest.split()
            if word != "COPY" or sources[0] == "--from=build":
                continue
            for source in sources:
                assert (ROOT / source).exists(), f"{name}: COPY {source}"
                assert not any(fnmatch.fnmatch(source, pattern) for pattern in IGNORED)


def test_what_changes_often_comes_after_what_takes_long():
    build = [f"{word} {rest}" for word, rest in stages()["build"]]
    order = [
        next(number for number, step in enumerate(build) if part in step)
        for part in (
            *("venv ", "COPY requirements", "requirements/cuda.txt", "transformer-engine.txt"),
            *("COPY megatron_rl", "COPY csrc", "MEGATRON_RL_CSRC=cuda"),
        )
    ]
    assert order == sorted(order)


def test_every_package_of_others_has_hashes():
    installs = [
        command for _, rest in STEPS for command in rest.split("&&") if "pip install" in command
    ]
    assert len(installs) == 3
    for command in installs:
        assert "--no-deps" in command
        assert "--require-hashes" in command or command.split()[-2:] == ["-e", "."]
        listed = re.search(r"-r (\S+)", command)
        assert listed is None or "--hash=sha256:" in (ROOT / listed[1]).read_text()


def test_the_image_runs_as_nobody_special_from_what_the_first_stage_made():
    steps = stages()["runtime"]
    words = [word for word, _ in steps]
    assert [rest for word, rest in steps if word == "USER"] == ["trainer"]
    last_run = max(number for number, word in enumerate(words) if word == "RUN")
    assert last_run < words.index("USER") < words.index("ENTRYPOINT")
    copied = [rest for word, rest in steps if word == "COPY" and "--from=build" in rest]
    assert all(rest.split()[1] == rest.split()[2] for rest in copied)  # a venv holds its own path
    settings = " ".join(rest for word, rest in steps if word == "ENV")
    for setting in ("HF_HUB_OFFLINE=1", "VIRTUAL_ENV=/opt/megatron_rl", "CUDA_HOME="):
        assert setting in settings


def test_health_is_looked_at_beside_a_run_without_its_gpus():
    (check,) = [rest for word, rest in stages()["runtime"] if word == "HEALTHCHECK"]
    options, command = check.split(" CMD ")
    words = json.loads(command)
    assert words[0] == "env"
    assert "MEGATRON_RL_DEVICE=cpu" in words
    arguments, _ = _parse(words[words.index("megatron-rl") + 1 :])
    assert arguments.command == "doctor"
    timeout = int(re.search(r"--timeout=(\d+)s", options)[1])
    assert timeout >= arguments.deadline + 10
    assert not load_config(ROOT / arguments.recipe, []).has_engine


@pytest.mark.parametrize("word", ["ENTRYPOINT", "CMD"])
def test_a_start_without_a_shell_passes_signals_on(word):
    (rest,) = [rest for step, rest in stages()["runtime"] if step == word]
    assert isinstance(json.loads(rest), list)
