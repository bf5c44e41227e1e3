"""The page of a run's responses, made of text that wants to be markup."""

import base64
import hashlib
import json
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from megatron_rl.commands import show
from megatron_rl.commands.main import main

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "<img src=x onerror=alert(1)>",
    "]]>&lt;&amp;\u2028\u2029\x00\x1b[31m",
    "@DATA@ @SCRIPT@ @SCRIPT_HASH@",
    "\u202egnp.exe\u202c 求 ½ 🙂 \ud800",
    "javascript:alert(1)",
    "__proto__",
]


def response(text, verdict="wrong", reward=-1.0, extracted=None):
    return {
        "text": text,
        "verdict": verdict,
        "extracted": extracted,
        "reward": reward,
        "tokens": 9,
        "truncated": False,
    }


def group(text, *verdicts, iteration=1, number=0):
    return {
        "iteration": iteration,
        "prompt": text,
        "answer": text,
        "source": text,
        "group": number,
        "responses": [response(text, verdict, extracted=text) for verdict in verdicts],
    }


class Parsed(HTMLParser):
    """Elements, and what stands in each script, as a browser's parser sees them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.scripts, self.policy = [], [], None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append("")
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = dict(attrs)["content"]

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script" and data.strip():
            self.scripts[-1] += data


@pytest.fixture(scope="module")
def page():
    return show.build_page("run", [group(text, "wrong", "correct") for text in HOSTILE])


def test_hostile_text_adds_no_element_and_comes_back_whole(page):
    harmless = Parsed(show.build_page("run", [group("x", "wrong")]))
    parsed = Parsed(page)
    assert parsed.tags == harmless.tags
    data = json.loads(parsed.scripts[0])
    assert [one["prompt"] for one in data["groups"]] == HOSTILE
    assert [one["responses"][1]["text"] for one in data["groups"]] == HOSTILE


def test_only_the_pages_own_script_may_run_and_nothing_is_loaded(page):
    parsed = Parsed(page)
    digest = base64.b64encode(hashlib.sha256(parsed.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in parsed.policy
    assert parsed.policy.startswith("default-src 'none'")
    for spelling in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval("):
        assert spelling not in parsed.scripts[1]
    assert "http://" not in page
    assert "https://" not in page


# As much of a browser as the script needs: elements with children, text and values.
BROWSER = r"""
class Node {
  constructor(tag) { this.tag = tag; this.children = []; this.value = ""; this.listeners = {}; }
  append(...nodes) { this.children.push(...nodes); }
  replaceChildren(...nodes) { this.children = nodes; }
  addEventListener(name, listener) { this.listeners[name] = listener; }
  get all() { return [this.textContent ?? "", ...this.children.flatMap((child) => child.all)]; }
}
const byId = {};
for (const id of ["data", "filters", "groups", "more", "count", "title"]) byId[id] = new Node(id);
byId.filters.elements = {};
for (const name of ["iteration", "verdict", "outcome", "search"]) {
  byId.filters.elements[name] = new Node(name);
  byId.filters.elements[name].value = name === "search" ? "" : "all";
}
globalThis.document = { getElementById: (id) => byId[id], createElement: (tag) => new Node(tag) };
byId.data.textContent = DATA;
require("vm").runInThisContext(SCRIPT);
const answers = STEPS.map((step) => {
  for (const field of Object.values(byId.filters.elements)) {
    field.value = step[field.tag] ?? (field.tag === "search" ? "" : "all");
  }
  byId.filters.listeners.input();
  return { count: byId.count.textContent, shown: byId.groups.children.length,
           more: !byId.more.hidden, text: byId.groups.all.join("\n") };
});
const options = byId.filters.elements.verdict.children.map((option) => option.textContent);
console.log(JSON.stringify({ answers, options }));
"""


def browse(groups, steps):
    """What the page shows after each choice of filters, by running its script."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node to run the page's script with")
    _, script = Parsed(show.build_page("run", groups)).scripts
    data = show.embedded({"run": "run", "groups": groups})
    constants = {"DATA": data, "SCRIPT": script, "STEPS": steps}
    given = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in constants.items())
    done = subprocess.run(
        [node, "-"], input=given + BROWSER, capture_output=True, text=True, check=True, timeout=60
    )
    return json.loads(done.stdout)


def test_filters():
    groups = [
        group("alpha", "wrong", "correct", iteration=1, number=0),
        group("beta", "correct", "correct", iteration=1, number=1),
        group("gamma", "no_answer", "wrong", iteration=2, number=5),
        group("<b>delta</b>", None, iteration=2, number=6),
    ]
    steps = [
        {},
        {"iteration": "2"},
        {"verdict": "no_answer"},
        {"outcome": "mixed"},
        {"outcome": "all wrong", "iteration": "1"},
        {"search": "BET"},
    ]
    result = browse(groups, steps)
    assert result["options"] == ["all", "correct", "no_answer", "ungraded", "wrong"]
    names = ("alpha", "beta", "gamma", "delta")
    found = [[name for name in names if name in step["text"]] for step in result["answers"]]
    assert found == [
        ["alpha", "beta", "gamma", "delta"],
        ["gamma", "delta"],
        ["gamma"],
        ["alpha"],
        [],
        ["beta"],
    ]
    assert result["answers"][0]["count"] == "4 of 4 prompts"
    assert "<b>delta</b>" in result["answers"][0]["text"]


def test_many_prompts_are_shown_in_parts():
    groups = [group(str(number), "wrong", number=number) for number in range(60)]
    (step,) = browse(groups, [{}])["answers"]
    assert (step["count"], step["shown"], step["more"]) == ("60 of 60 prompts", 25, True)


def test_command_line(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    assert main(["show", str(run)]) == 2
    assert "metrics.rollouts_every=N" in capsys.readouterr().err
    (run / "rollouts.jsonl").write_text("")
    assert main(["show", str(run)]) == 2
    assert "holds no rollouts yet" in capsys.readouterr().err
    (run / "rollouts.jsonl").write_text('{"iteration": 1, "reward/mean": 0.5}\n')
    assert main(["show", str(run)]) == 2
    assert "line 1: has no answer, group, prompt" in capsys.readouterr().err
    (run / "rollouts.jsonl").write_text(json.dumps(group("x", "wrong")) + "\n")
    assert main(["show", str(run)]) == 0
    assert "1 prompts in" in capsys.readouterr().out
    assert (run / "rollouts.html").read_text().startswith("<!doctype html>")
    assert main(["show", str(run), "--output", str(tmp_path / "absent" / "x.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err
