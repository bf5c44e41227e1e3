"""What the model reads: BOS as its tokenizer has it, arguments and the date of a chat template."""

import json
import shutil
from datetime import date

import pytest
from transformers import AutoTokenizer

from megatron_rl.errors import InputError
from megatron_rl.prompts.clock import FixedClock
from megatron_rl.prompts.config import PromptsConfig
from megatron_rl.prompts.dataset import PromptStream
from megatron_rl.prompts.template import choose_template
from megatron_rl.prompts.tokenizer import load_tokenizer

ADDS_BOS = {  # as Llama's and Mistral's base models have it
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<bos>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
}
# As Llama 3.2's, without its words.
DATED = (
    "{% if not date is defined %}{% set date = strftime_now('%d %b %Y') %}{% endif %}"
    "<bos>{{ date }}{% for m in messages %}{{ m.content }}{% endfor %}"
)
THINKS = "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking %}?{% endif %}"


@pytest.fixture
def model(model_dir, tmp_path):
    """A model directory, with changes to tokenizer.json and tokenizer_config.json."""

    def make(chat_template=None, **changes):
        directory = tmp_path / "model"
        shutil.copytree(model_dir, directory, dirs_exist_ok=True)
        (directory / "tokenizer.model").unlink()
        for name, change in (
            ("tokenizer", changes),
            ("tokenizer_config", {"chat_template": chat_template} if chat_template else {}),
        ):
            path = directory / f"{name}.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | change))
        return directory

    return make


@pytest.fixture
def tokens_of(write_jsonl):
    """The ids of a prompt, as a run has them."""

    def ids(directory, prompt, **settings):
        path = write_jsonl({"prompt": prompt, "answer": "1"})
        config = PromptsConfig(path=str(path), prompts_per_iteration=1, **settings)
        stream = PromptStream(config, load_tokenizer(directory), seed=0)
        return stream.all_prompts()[0].tokens.tolist()

    return ids


@pytest.mark.parametrize("prompt", ["7+52?", "1?"])
def test_bos_is_there_where_transformers_has_it(model, tokens_of, prompt):
    plain = model()
    assert tokens_of(plain, prompt) == AutoTokenizer.from_pretrained(plain)(prompt)["input_ids"]
    adds = model(post_processor=ADDS_BOS)
    expected = AutoTokenizer.from_pretrained(adds)(prompt)["input_ids"]
    assert expected[0] == 2
    assert tokens_of(adds, prompt) == expected
    assert tokens_of(adds, prompt, add_bos=False) == expected[1:]


def test_bos_is_never_there_twice(model, tokens_of):
    adds = model(post_processor=ADDS_BOS)
    assert tokens_of(adds, "7", template="{prompt}?") == [2, 11, 108]
    assert tokens_of(adds, "7", template="<bos>{prompt}?") == [2, 11, 108]


@pytest.mark.parametrize(("template", "expected"), [("<bos>7?", [2, 11, 108]), ("7?", [11, 108])])
def test_a_chat_template_has_its_own_bos_or_none(model, tokens_of, template, expected):
    """As transformers tokenizes a chat."""
    directory = model(chat_template=template, post_processor=ADDS_BOS)
    stock = AutoTokenizer.from_pretrained(directory).apply_chat_template(
        [{"role": "user", "content": "1"}], return_dict=False
    )
    assert tokens_of(directory, "1") == stock == expected


def test_the_date_is_that_of_the_recipe_and_not_of_the_clock(model, monkeypatch):
    tokenizer = load_tokenizer(model(chat_template=DATED))
    config = PromptsConfig(path="p", date="2026-03-04")
    chosen = choose_template(config, tokenizer)
    assert (chosen.render("7?"), chosen.date) == ("<bos>04 Mar 20267?", "2026-03-04")
    monkeypatch.setattr("megatron_rl.prompts.template.today", lambda: "2031-12-30")
    chosen = choose_template(PromptsConfig(path="p"), tokenizer)
    assert (chosen.render("7?"), chosen.date) == ("<bos>30 Dec 20317?", "2031-12-30")
    given = PromptsConfig(path="p", chat_template_kwargs={"date": "1 + 1"})
    chosen = choose_template(given, tokenizer)
    assert (chosen.render("7?"), chosen.date) == ("<bos>1 + 17?", None)


@pytest.mark.parametrize("form", ["%d %b %Y", "%A, %B %d", "%a %y-%m", "%Y"])
def test_the_form_is_that_of_the_c_locale(form):
    """Python starts in it; what a library sets later must not matter."""
    assert FixedClock("2026-11-27").strftime(form) == date(2026, 11, 27).strftime(form)


def test_arguments_reach_the_chat_template(model, tokens_of):
    directory = model(chat_template=THINKS)
    assert tokens_of(directory, "7") == [11]
    assert tokens_of(directory, "7", chat_template_kwargs={"enable_thinking": True}) == [11, 108]


def test_a_person_is_shown_the_first_prompt(model, write_jsonl):
    tokenizer = load_tokenizer(model(post_processor=ADDS_BOS))
    config = PromptsConfig(path=str(write_jsonl({"prompt": "7+52?", "answer": "1"})))
    assert PromptStream(config, tokenizer, seed=0).shown_first(tokenizer) == [
        "first prompt, 5 tokens: '<bos>7+52?'",
        "  ids 2, 11, 104, 56, 108",
    ]


# As Qwen2.5's, without its words.
DEFAULTS = (
    "{% if messages[0].role == 'system' %}<bos>{{ messages[0].content }}"
    "{% else %}<bos>1 + 2{% endif %}"
    "{% for m in messages if m.role != 'system' %},{{ m.content }}{% endfor %}="
)


def test_the_templates_own_system_turn_is_known_and_can_be_left_out(model):
    tokenizer = load_tokenizer(model(chat_template=DEFAULTS))
    chosen = choose_template(PromptsConfig(path="p"), tokenizer)
    assert (chosen.own_system, chosen.render("7")) == ("1 + 2", "<bos>1 + 2,7=")
    empty = PromptsConfig(path="p", default_system=False)
    assert choose_template(empty, tokenizer).render("7") == "<bos>,7="
    given = PromptsConfig(path="p", default_system=False, system="9")
    assert choose_template(given, tokenizer).render("7") == "<bos>9,7="
    assert choose_template(empty, tokenizer).render("7", (("user", "7"),)) == "<bos>,7="


@pytest.mark.parametrize("template", [DATED, THINKS, "{{ messages[-1].content }}"])
def test_most_templates_have_no_system_turn_of_their_own(model, template):
    tokenizer = load_tokenizer(model(chat_template=template))
    assert choose_template(PromptsConfig(path="p"), tokenizer).own_system == ""


def test_a_thought_that_a_template_opens_is_known(model):
    opens = "{% for m in messages %}{{ m.content }}{% endfor %}=<think>\n"
    tokenizer = load_tokenizer(model(chat_template=opens))
    assert choose_template(PromptsConfig(path="p"), tokenizer).opens_thought("7")
    closed = load_tokenizer(model(chat_template=f"{opens}</think>\n"))
    assert not choose_template(PromptsConfig(path="p"), closed).opens_thought("7")
    bare = load_tokenizer(model(chat_template="{{ messages[-1].content }}"))
    own = PromptsConfig(path="p", template="Q: {prompt} <think>")
    assert choose_template(own, bare).opens_thought("7")
    rendered_before = choose_template(PromptsConfig(path="p", template="{prompt}"), bare)
    assert rendered_before.opens_thought("7=<think>")
    assert not rendered_before.opens_thought("a <think> of 7")


def test_prompts_carry_that_their_responses_start_in_a_thought(model, write_jsonl):
    opens = "{% for m in messages %}{{ m.content }}{% endfor %}=<think>"
    tokenizer = load_tokenizer(model(chat_template=opens))
    config = PromptsConfig(path=str(write_jsonl({"prompt": "7?", "answer": "1"})))
    assert PromptStream(config, tokenizer, seed=0).all_prompts()[0].opens_thought


def test_a_system_turn_that_a_template_refuses_is_whose_it_is(model):
    first = "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}7="
    tokenizer = load_tokenizer(model(chat_template=first))
    with pytest.raises(InputError, match=r"takes no system turn: set prompts\.system=''$"):
        choose_template(PromptsConfig(path="p", system="S"), tokenizer)
    chosen = choose_template(PromptsConfig(path="p"), tokenizer)
    assert chosen.render("7", (("user", "7"),)) == "7="
    with pytest.raises(InputError, match=r"takes no system turn: take it out of the data$"):
        chosen.render("7", (("system", "S"), ("user", "7")))
