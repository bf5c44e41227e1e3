import json
import shutil
import subprocess
import sys
from functools import partial

import pytest

from megatron_rl.errors import InputError
from megatron_rl.prompts.config import PromptsConfig
from megatron_rl.prompts.template import FOR_MATHEMATICS, choose_template
from megatron_rl.prompts.tokenizer import load_tokenizer

CHAT = (
    "{% for message in messages %}<bos>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)


@pytest.fixture(scope="module")
def hugging_face(model_dir):
    return load_tokenizer(model_dir)


@pytest.fixture(scope="module")
def sentencepiece(model_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("sentencepiece")
    shutil.copy(model_dir / "tokenizer.model", directory)
    return load_tokenizer(directory)


@pytest.fixture
def copied(model_dir, tmp_path):
    """A model directory to spoil; takes the changes to make to its JSON files."""

    def copy(**changes):
        directory = tmp_path / "model"
        shutil.copytree(model_dir, directory)
        for name, change in changes.items():
            path = directory / f"{name}.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        return directory

    return copy


def test_importing_the_prompts_does_not_import_transformers():
    code = (
        "import sys, megatron_rl.prompts.tokenizer, megatron_rl.prompts.source;"
        "print([m for m in ('transformers', 'datasets', 'sentencepiece') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_both_kinds_agree_on_every_row(hugging_face, sentencepiece, quickstart_rows):
    texts = [row[key] for row in quickstart_rows for key in ("prompt", "response")]
    ids = hugging_face.encode_batch(texts)
    assert ids == sentencepiece.encode_batch(texts)
    for text, row in zip(texts[::50], ids[::50], strict=True):
        assert hugging_face.encode(text) == sentencepiece.encode(text) == row
        assert hugging_face.decode(row) == sentencepiece.decode(row) == text


def test_a_bos_that_a_lone_sentencepiece_file_does_not_tell_of_is_known(sentencepiece, tmp_path):
    """The quickstart's model has one; whether texts begin with it stands in neither file."""
    pieces = sentencepiece._pieces
    assert sentencepiece.untold_bos is None  # no config.json says that the model has one
    (tmp_path / "tokenizer.model").write_bytes(pieces.serialized_model_proto())
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    expected = str(pieces.id_to_piece(pieces.bos_id())) if pieces.bos_id() >= 0 else None
    assert load_tokenizer(tmp_path).untold_bos == expected
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": None, "eos_token_id": 2}))
    assert load_tokenizer(tmp_path).untold_bos is None


def test_what_each_kind_says_of_itself(hugging_face, sentencepiece):
    assert (hugging_face.name, sentencepiece.name) == (
        "huggingface:Qwen2Tokenizer",
        "sentencepiece",
    )
    for tokenizer in (hugging_face, sentencepiece):
        assert tokenizer.vocab_size == 112
        assert tokenizer.eos_ids == (1,)
        assert {"<bos>", "<eos>", "<pad>"} <= set(tokenizer.control_tokens)
        assert not tokenizer.has_chat_template


def test_nothing_is_added_and_control_tokens_of_a_template_are_honoured(
    hugging_face, sentencepiece
):
    for tokenizer in (hugging_face, sentencepiece):
        # ids 0..3 are control tokens, the number n is n + 4, then + - = , ?
        assert tokenizer.encode("7+52?") == [11, 104, 56, 108]
        assert tokenizer.encode("<bos>7<eos>") == [2, 11, 1]
        assert tokenizer.encode("") == []
        assert tokenizer.decode([2, 11, 104, 56, 1]) == "7+52"
        assert tokenizer.decode([2, 11, 104, 56, 1], skip_special=False) == "<bos>7+52<eos>"


def test_eos_ids_are_the_union_with_the_tokenizers_own_first(copied):
    directory = copied(config={"eos_token_id": 2}, generation_config={"eos_token_id": [0, 1]})
    assert load_tokenizer(directory).eos_ids == (1, 2, 0)
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").unlink()
    assert load_tokenizer(directory).name == "sentencepiece"
    assert load_tokenizer(directory).eos_ids == (1, 2, 0)


def test_chat_template_is_rendered_up_to_the_response(copied):
    tokenizer = load_tokenizer(copied(tokenizer_config={"chat_template": CHAT}))
    assert tokenizer.has_chat_template
    assert tokenizer.render_chat((("user", "7+5?"),)) == "<bos>7+5?="
    assert tokenizer.encode(tokenizer.render_chat((("user", "7?"),))) == [2, 11, 108, 106]


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% for %}", "{{ a.b.c }}"])
def test_a_chat_template_that_fails_names_the_way_out(copied, template):
    tokenizer = load_tokenizer(copied(tokenizer_config={"chat_template": template}))
    with pytest.raises(InputError, match=r"use none: set prompts\.template='\{prompt\}'$"):
        choose_template(PromptsConfig(path="p"), tokenizer)
    with pytest.raises(InputError, match="the chat template fails on the turns user"):
        tokenizer.render_chat((("user", "7+5?"),))


def test_template_comes_before_chat_template_before_the_prompt_itself(copied, hugging_face):
    with_chat = load_tokenizer(copied(tokenizer_config={"chat_template": CHAT}))
    own = PromptsConfig(path="p", template="Q: {prompt}{{}}")
    assert choose_template(own, with_chat).render("7?") == "Q: 7?{}"
    assert choose_template(PromptsConfig(path="p"), with_chat).render("7?") == "<bos>7?="
    assert choose_template(PromptsConfig(path="p"), hugging_face).render("{prompt}") == "{prompt}"


def test_the_papers_words_are_the_default_of_mathematics(copied, hugging_face, sentencepiece):
    chat = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    with_chat = load_tokenizer(copied(tokenizer_config={"chat_template": chat}))
    system = r"Please reason step by step, and put your final answer within \boxed{}."
    user = r"7? Let's think step by step and output the final answer within \boxed{}."
    open_config = PromptsConfig(path="p")
    for_math = partial(choose_template, texts=FOR_MATHEMATICS)
    assert for_math(open_config, with_chat).render("7?") == f"[system]{system}[user]{user}"
    for plain in (hugging_face, sentencepiece):  # without a chat template the prompt is untouched
        assert for_math(open_config, plain).render("7?") == "7?"
    none = PromptsConfig(path="p", system="", instruction="")
    assert for_math(none, with_chat).render("7?") == "[user]7?"
    words = PromptsConfig(path="p", system="S", instruction="I")
    assert for_math(words, with_chat).render("7?") == "[system]S[user]7? I"
    assert choose_template(open_config, with_chat).render("7?") == "[user]7?"


def test_a_recipes_own_template_is_used_as_it_is(hugging_face, sentencepiece):
    """Such as the paper's words for a tokenizer that has no chat template."""
    config = PromptsConfig(
        path="p", template="{prompt}\nPlease put your answer within \\boxed{{}}."
    )
    for tokenizer in (hugging_face, sentencepiece):
        rendered = choose_template(config, tokenizer, FOR_MATHEMATICS).render("7?")
        assert rendered == "7?\nPlease put your answer within \\boxed{}."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"eos_token_id": 500}}, r"ids \[500\] lie outside the tokenizer's 112 tokens"),
        ({"config": {"eos_token_id": "<eos>"}}, r"config\.json: eos_token_id='<eos>': must be"),
        ({"config": {"hidden_size": "big"}}, "transformers cannot load the tokenizer"),
        ({"tokenizer": {"model": {"type": "Nothing"}}}, "transformers cannot load the tokenizer"),
    ],
)
def test_a_broken_directory_is_named(copied, changes, message):
    with pytest.raises(InputError, match=message):
        load_tokenizer(copied(**changes))


@pytest.mark.parametrize("name", ["config", "tokenizer", "tokenizer_config"])
def test_a_file_that_is_cut_off_is_an_input_error(copied, name):
    directory = copied()
    path = directory / f"{name}.json"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"Copy the file again|cut off"):
        load_tokenizer(directory)


def test_no_end_of_sequence_anywhere_is_an_error(copied):
    none = {"eos_token_id": None}
    directory = copied(config=none, generation_config=none, tokenizer_config={"eos_token": None})
    tokenizer_config = directory / "tokenizer_config.json"
    settings = json.loads(tokenizer_config.read_text())
    # Only the base class has no end-of-sequence token of its own, and only without model_type.
    settings = {**settings, "tokenizer_class": "PreTrainedTokenizerFast"}
    tokenizer_config.write_text(json.dumps(settings))
    (directory / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"names an end-of-sequence token\. Set eos_token_id in"):
        load_tokenizer(directory)


def test_a_tokenizer_that_brings_code_is_refused_without_running_it(copied):
    directory = copied(
        config={"model_type": "unheard_of"},
        tokenizer_config={
            "tokenizer_class": "EvilTokenizer",
            "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]},
        },
    )
    marker = directory / "ran"
    (directory / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    with pytest.raises(InputError, match="needs code of its own"):
        load_tokenizer(directory)
    assert not marker.exists()


def test_a_directory_without_tokenizer_and_a_broken_sentencepiece_model(tmp_path):
    with pytest.raises(InputError, match="there is no such model directory"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(InputError, match=r"holds no tokenizer: none of tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match=r"tokenizer\.model: is not a SentencePiece model"):
        load_tokenizer(tmp_path)
