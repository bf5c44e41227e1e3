"""Every malformed input of the list is one clear error, or is taken with what it skips counted.

Commands run in this process, and `train` ends where it would build a model.
"""

import ast
import json
import os
import re
import shlex
import shutil
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from malformed_inputs import GOOD_RECIPE, GOOD_ROWS, Case, make_model, read_cases

from megatron_rl.auto_engine import with_engine
from megatron_rl.commands.main import main
from megatron_rl.preflight import Inputs, read_inputs

LIMIT_S = 30  # of one case; all of them together take less than a minute on one core
MOST_CHARS = 3000  # of a message, which nobody reads on if it is longer
CASES = read_cases()
PACKAGE = Path(__file__).parents[2] / "megatron_rl"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("malformed") / "model"
    directory.mkdir()
    make_model(directory)
    return directory


# What a message tells to set, word for word; N, NAME and package.module stand for what only a user
# knows.
SETTING = r"[a-z_]+(?:\.[a-z_]+)+=(?!N\b|[A-Z]{4,}\b|package|\.\.\.)\S+?(?=[.,;:)]*(?:\s|$))"
WAY_OUT = re.compile(rf"(?:[Ss]et|skipped:) ({SETTING}(?:(?: and|,? or)? {SETTING})*)")


def ways_out(told: str) -> list[list[str]]:
    """The overrides of each way out of a message, as a shell hands them on.

    Of a message with several problems it is the first way out of each, all together.
    """
    problems = re.split(r"\n  - ", told)[1:] or [told]
    each = [
        [
            [shlex.split(setting)[0] for setting in re.findall(SETTING, alternative)]
            for found in WAY_OUT.findall(problem)
            for alternative in re.split(r",? or ", found)
        ]
        for problem in problems
    ]
    if len(each) == 1:
        return each[0]
    return [[override for ways in each for override in ways[0]]] if all(each) else []


class Bench:
    """A folder with a recipe that works, its data and its model, to be spoiled."""

    def __init__(self, folder: Path, model_dir: Path, capsys, monkeypatch) -> None:
        self.folder, self._capsys, self._monkeypatch = folder, capsys, monkeypatch
        self._good_model, self.way_out = model_dir, list[str]()
        self.model = folder / "model"
        shutil.copytree(model_dir, self.model)
        self.data = self.write("data.jsonl", GOOD_ROWS)
        self.recipe = self.write("recipe.yaml", self.filled(GOOD_RECIPE))
        self.inputs: Inputs | None = None
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setattr("megatron_rl.session.train_session", self._read)
        monkeypatch.setattr("megatron_rl.prompts.template.SAMPLE_LIMIT_S", 0.5)

    def filled(self, text: str) -> str:
        """The text with the paths of this folder."""
        places = {"OUT": "out", "MODEL": "model", "DATA": "data.jsonl"}
        for word, name in places.items():
            text = text.replace(word, str(self.folder / name))
        return text

    def write(self, name: str, text: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        return path

    def again(self, way_out: list[str]) -> "Bench":
        """A fresh one, in which every command is also given these overrides."""
        folder = self.folder / f"with {' '.join(way_out)}".replace("/", "_")[:200]
        folder.mkdir()
        bench = Bench(folder, self._good_model, self._capsys, self._monkeypatch)
        bench.way_out = way_out
        return bench

    def train(self, *overrides: str) -> tuple[int, str, str]:
        return self.run("train", str(self.recipe), *overrides, *self.way_out)

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a command."""
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = self._capsys.readouterr()
        return code, said.out, said.err

    def environment(self, variables: dict[str, str]) -> None:
        for name, value in variables.items():
            self._monkeypatch.setenv(name, value)

    def _read(self, config) -> None:
        self.inputs = read_inputs(with_engine(config, "cpu", lambda line: None), 1)


def recipe(bench: Bench, given: dict[str, Any]):
    """text: a whole recipe; or replace: [old, new] in the good one. files: recipes beside it."""
    for name, text in given.get("files", {}).items():
        bench.write(name, bench.filled(text))
    if "text" in given:
        bench.write("recipe.yaml", bench.filled(given["text"]))
    if "replace" in given:
        old, new = given["replace"]
        assert old in GOOD_RECIPE
        bench.write("recipe.yaml", bench.filled(GOOD_RECIPE.replace(old, new)))
    bench.environment(given.get("environment", {}))
    return bench.train()


def override(bench: Bench, given: dict[str, Any]):
    """input: an override of the good recipe, or a list of them."""
    bench.environment(given.get("environment", {}))
    texts = given["input"] if isinstance(given["input"], list) else [given["input"]]
    return bench.train(*(bench.filled(text) for text in texts))


def data_row(bench: Bench, given: dict[str, Any]):
    """row: the text of a third line; overrides: of the good recipe."""
    bench.write("data.jsonl", GOOD_ROWS + given["row"] + "\n")
    return bench.train(*given.get("overrides", []))


def data_file(bench: Bench, given: dict[str, Any]):
    """place: what stands at path (data.jsonl): a text, {hex: ...} or a kind of file."""
    path = bench.folder / given.get("path", "data.jsonl")
    place(bench, path, given.get("place"))
    return bench.train(f"prompts.path={bench.folder / given.get('named', path.name)}")


def config_json(bench: Bench, given: dict[str, Any]):
    """set: fields; remove: names; place: something else in place of the file."""
    change_json(bench, bench.model / "config.json", given)
    return bench.train(*given.get("overrides", []))


def tokenizer(bench: Bench, given: dict[str, Any]):
    """file: its name; then as in config_json."""
    change_json(bench, bench.model / given["file"], given)
    return bench.train(*given.get("overrides", []))


def safetensors(bench: Bench, given: dict[str, Any]):
    """set: tensor -> fields of its header; rename, remove: tensors; cut, append: of the file."""
    path = bench.model / "model.safetensors"
    if "place" in given:
        place(bench, path, given["place"])
    if given.keys() & {"set", "rename", "remove", "header"}:
        change_header(path, given)
    data = path.read_bytes() if path.is_file() else b""
    if "cut" in given:
        path.write_bytes(data[: given["cut"]])
    if "append" in given:
        path.write_bytes(data + given["append"].encode())
    if "index" in given:
        index = given["index"]
        text = index if isinstance(index, str) else json.dumps(index)
        bench.write("model/model.safetensors.index.json", text)
    if "move" in given:
        path.rename(bench.model / given["move"])
    return bench.train()


def reward(bench: Bench, given: dict[str, Any]):
    """module: the text of rewards.py, whose `reward` is called; overrides: more settings."""
    overrides = [*given.get("overrides", [])]
    if "module" in given:
        bench.write("rewards.py", given["module"])
        limits = ["reward.deadline_s=0.1", "reward.num_workers=1"]
        overrides = ["reward.kind=rewards:reward", *limits, *overrides]
    return bench.train(*overrides)


def command_line(bench: Bench, given: dict[str, Any]):
    """arguments: of megatron-rl, DATA, MODEL, RECIPE and OUT being paths; files: name -> text."""
    for name, text in given.get("files", {}).items():
        place(bench, bench.folder / name, text)
    arguments = [bench.filled(str(text)) for text in given["arguments"]]
    takes_overrides = arguments[:1] in (["train"], ["evaluate"], ["plan"], ["grade"])
    arguments += bench.way_out if takes_overrides else []
    return bench.run(*(text.replace("RECIPE", str(bench.recipe)) for text in arguments))


KINDS: dict[str, Callable[[Bench, dict[str, Any]], tuple[int, str, str]]] = {
    function.__name__: function
    for function in (
        recipe, override, data_row, data_file, config_json, tokenizer, safetensors, reward,
        command_line,
    )
}  # fmt: skip


def place(bench: Bench, path: Path, what: Any) -> None:
    """Put a text, bytes, a FIFO, a link, a directory or nothing where a file belongs."""
    path.unlink(missing_ok=True)
    if isinstance(what, str):
        bench.write(str(path.relative_to(bench.folder)), bench.filled(what))
    elif what is None:
        return
    elif "hex" in what:
        path.write_bytes(bytes.fromhex(what["hex"]))
    elif "latin1" in what:
        path.write_bytes(what["latin1"].encode("latin-1"))
    elif "link" in what:
        path.symlink_to(what["link"])
    elif "directory" in what:
        path.mkdir()
        for name, text in what["directory"].items():
            place(bench, path / name, text)
    elif "sparse" in what:
        with path.open("wb") as file:
            file.truncate(what["sparse"])
    elif "fifo" in what:
        os.mkfifo(path)
    elif "parquet" in what:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(what["parquet"]), path)
    else:
        raise AssertionError(f"unknown content {what}")


def change_json(bench: Bench, path: Path, given: dict[str, Any]) -> None:
    if "place" in given:
        place(bench, path, given["place"])
        return
    fields = json.loads(path.read_text())
    for name in given.get("remove", []):
        del fields[name]
    path.write_text(json.dumps(fields | given.get("set", {})))


def change_header(path: Path, given: dict[str, Any]) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    for name, fields in given.get("set", {}).items():
        header[name] = header[name] | fields if isinstance(fields, dict) else fields
    for old, new in given.get("rename", {}).items():
        header[new] = header.pop(old)
    for name in given.get("remove", []):
        del header[name]
    text = given.get("header") or json.dumps(header)
    path.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + data[8 + length :])


@pytest.fixture
def bench(tmp_path, model_dir, capsys, monkeypatch):
    def fail(*_: object) -> None:
        raise TimeoutError(f"the case ran for {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(LIMIT_S)
    yield Bench(tmp_path, model_dir, capsys, monkeypatch)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    sys.modules.pop("rewards", None)


def test_the_list_is_long_and_its_names_are_unique():
    assert len(CASES) >= 400
    names = [(case.kind, case.name) for case in CASES]
    assert len(names) == len(set(names))
    assert {case.kind for case in CASES} == KINDS.keys()


def test_what_is_spoiled_is_good(bench):
    code, _, told = bench.train()
    assert (code, told) == (0, "")
    assert bench.inputs.prompts.report.num_used == 2


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}: {case.name}")
def test_a_malformed_input(bench, case: Case):
    code, out, told = KINDS[case.kind](bench, case.given)
    assert "Traceback" not in told
    if case.error is not None:
        assert code == 2, f"it was taken: {out}"
        assert told.count("megatron-rl: error: ") == 1
        assert case.error in told
        assert len(told) < MOST_CHARS
        takes_overrides = case.given.get("arguments", [])[:1] != ["convert"]
        for way_out in ways_out(told) if takes_overrides else ():
            again = bench.again(way_out)
            code, _, told = KINDS[case.kind](again, case.given)
            assert (code, told) == (0, ""), f"{way_out} is no way out"
    else:
        assert (code, told) == (0, "")
    if case.given.get("skipped") is not None and bench.inputs is not None:
        report = bench.inputs.prompts.report
        assert report.num_hopeless + report.num_overlong == case.given["skipped"]
    for secret in case.given.get("hidden", []):
        assert secret not in out + told


def test_the_command_that_an_error_names_makes_data_that_train_takes(bench):
    rows = [{"prompt": f"{n}+1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in (1, 2)]
    bench.write("data.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    code, _, told = bench.train()
    assert code == 2
    program, *command = shlex.split(told[told.index("megatron-rl prepare") :])
    assert program == "megatron-rl"
    assert bench.run(*command)[0] == 0
    assert bench.train("prompts.path=prepared.jsonl") == (0, "", "")


def test_the_ways_out_of_messages_are_found():
    assert ways_out("a.b=1: x. Set a.b=2 and a.c=null, or set a.d=[x,y]. Then go on") == [
        ["a.b=2", "a.c=null"],
        ["a.d=[x,y]"],
    ]
    assert ways_out("1 problem:\n  - x. Set a.b=2.\n  - y. Set a.c='{p}', or set a.d=1") == [
        ["a.b=2", "a.c={p}"]
    ]
    assert ways_out("x. Set a.b=N, or name a.c=NAME") == []


def test_every_way_out_that_says_set_is_typed():
    """In all places where a setting is refused: `Set section.key=value`, which can be typed."""
    loose = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "ConfigError":
                named = [word.value for word in node.keywords if word.arg == "way_out"]
                for told in (*named, *node.args[3:]):
                    text = "".join(_texts(told))
                    if re.search(r"\b[Ss]et (?![\w.{}]+\.[\w{}]+=|\{[a-z_]+\}=)", text):
                        loose.append(f"{path.name}:{node.lineno}: {text}")
    assert loose == []


def _texts(told: ast.expr):
    """The texts of an expression, {} standing for what is filled in."""
    if isinstance(told, ast.Constant):
        yield str(told.value)
    elif isinstance(told, ast.FormattedValue):
        yield "{x}"
    elif isinstance(told, ast.JoinedStr):
        for part in told.values:
            yield from _texts(part)
    elif isinstance(told, ast.IfExp):
        yield from (*_texts(told.body), " ", *_texts(told.orelse))
    elif isinstance(told, ast.BinOp):
        yield from (*_texts(told.left), *_texts(told.right))
    else:
        yield "{x}.{x}="
