import pytest
from char_tokenizer import CharTokenizer, ChatCharTokenizer

from megatron_rl.errors import InputError
from megatron_rl.prompts.config import PromptsConfig
from megatron_rl.prompts.dataset import PromptStream


@pytest.fixture
def ten_rows(write_jsonl):
    return write_jsonl(*[{"prompt": f"{n}?", "answer": n, "response": f"={n}"} for n in range(10)])


def _stream(path, *, seed=0, with_gold=False, tokenizer=None, **settings):
    config = PromptsConfig(path=str(path), **{"prompts_per_iteration": 4, **settings})
    return PromptStream(config, tokenizer or CharTokenizer(), seed, with_gold)


def _seen(prompts):
    return [(prompt.group_id, prompt.tokens.tolist(), prompt.answer) for prompt in prompts]


def test_prompts_carry_tokens_answer_source_and_gold(ten_rows):
    prompt = _stream(ten_rows, shuffle=False, with_gold=True).next_batch()[2]
    assert (prompt.group_id, prompt.answer, prompt.source) == (2, "2", "data")
    assert prompt.tokens.tolist() == [ord("2"), ord("?")]
    assert prompt.gold_tokens.tolist() == [ord("="), ord("2"), 3]  # ends with the first eos id
    assert _stream(ten_rows).next_batch()[0].gold_tokens is None


def test_batches_wrap_over_epochs_with_ids_that_never_repeat(ten_rows):
    stream = _stream(ten_rows)
    batches = [stream.next_batch() for _ in range(5)]
    assert [prompt.group_id for batch in batches for prompt in batch] == list(range(20))
    answers = [prompt.answer for batch in batches for prompt in batch]
    assert sorted(answers[:10]) == sorted(answers[10:]) == list("0123456789")
    assert answers[:10] != answers[10:]


def test_a_batch_may_be_filled_with_further_prompts(ten_rows):
    """They are those that would have come next, and a cursor of before takes all of them back."""
    stream, plain = _stream(ten_rows), _stream(ten_rows)
    stream.next_batch()
    before = stream.state_dict()
    first, further = stream.next_batch(), stream.more(2)
    assert _seen(stream.batch) == _seen([*first, *further])
    rest = _seen([*stream.next_batch(), *stream.next_batch()])
    expected = [pair for _ in range(5) for pair in _seen(plain.next_batch())]
    size = len(first)
    assert _seen([*first, *further]) + rest == expected[size:][: 3 * size + 2]
    assert len(stream.batch) == size
    stream.load_state_dict(before)
    assert _seen(stream.next_batch()) == _seen(first)


def test_a_data_set_smaller_than_a_batch_fills_it(ten_rows):
    batch = _stream(ten_rows, prompts_per_iteration=25).next_batch()
    assert [prompt.group_id for prompt in batch] == list(range(25))


@pytest.mark.parametrize("num_batches", [0, 1, 2, 3, 5, 6])  # 5: exactly at the end of an epoch
def test_a_resumed_stream_gives_the_same_following_batches(ten_rows, num_batches):
    stream = _stream(ten_rows, seed=7)
    for _ in range(num_batches):
        stream.next_batch()
    resumed = _stream(ten_rows, seed=7)
    resumed.load_state_dict(stream.state_dict())
    for _ in range(6):
        assert _seen(resumed.next_batch()) == _seen(stream.next_batch())


def test_the_order_is_the_seeds(ten_rows):
    first, same, other = (_seen(_stream(ten_rows, seed=seed).next_batch()) for seed in (1, 1, 2))
    assert first == same != other


def test_resuming_on_changed_data_is_refused(write_jsonl, ten_rows):
    state = _stream(ten_rows, with_gold=True).state_dict()
    rows = [{"prompt": f"{n}?", "answer": n, "response": f"={n}"} for n in range(10)]
    for key, value in (("prompt", "x?"), ("answer", "x"), ("response", "x")):
        changed = write_jsonl({**rows[0], key: value}, *rows[1:], name="changed.jsonl")
        with pytest.raises(InputError, match="10 usable rows now, 10 then"):
            _stream(changed, with_gold=True).load_state_dict(state)
    with pytest.raises(InputError, match="9 usable rows now, 10 then"):
        _stream(write_jsonl(*rows[1:], name="fewer.jsonl"), with_gold=True).load_state_dict(state)
    moved = write_jsonl(*rows, name="moved.jsonl")
    _stream(moved, with_gold=True).load_state_dict(state)


def test_overlong_prompts_are_counted_and_left_out(write_jsonl):
    rows = [{"prompt": "x" * n, "answer": n} for n in (1, 6, 5, 9, 3)]
    stream = _stream(write_jsonl(*rows), max_prompt_tokens=5, shuffle=False)
    assert [prompt.answer for prompt in stream.all_prompts()] == ["1", "5", "3"]
    report = stream.report
    assert (report.num_read, report.num_used, report.num_overlong) == (5, 3, 2)
    assert report.overlong_rows == ("data:2", "data:4")
    assert (report.max_prompt_tokens, report.mean_prompt_tokens) == (5, 3.0)


def test_overlong_prompts_can_be_refused(write_jsonl):
    path = write_jsonl(*[{"prompt": "x" * n, "answer": n} for n in (1, 6)])
    with pytest.raises(InputError, match=r"data:2: longer than max_prompt_tokens=5"):
        _stream(path, max_prompt_tokens=5, overlong="error")
    with pytest.raises(InputError, match=r"all 2 prompts are .*Set prompts\.max_prompt_tokens=7,"):
        _stream(path, max_prompt_tokens=1, template="Q{prompt}")


def test_length_is_counted_after_the_template(write_jsonl):
    path = write_jsonl({"prompt": "7?", "answer": "7"})
    chat = _stream(path, tokenizer=ChatCharTokenizer())
    assert chat.report.max_prompt_tokens == len("[user]7?[assistant]")
    assert _stream(path, template="{prompt}{{}}").report.max_prompt_tokens == len("7?{}")


def test_text_that_spells_a_control_token_is_refused(write_jsonl):
    path = write_jsonl(
        {"prompt": "1?", "answer": "1", "response": "fine"},
        {"prompt": "stop <eos> now", "answer": "1", "response": "fine"},
        {"prompt": "1?", "answer": "1", "response": "1<eos>"},
    )
    with pytest.raises(InputError, match="2 unusable rows") as error:
        _stream(path, with_gold=True)
    assert "data:2: spells the tokenizer's control token '<eos>'" in str(error.value)
    assert "data:3" in str(error.value)
    # The template may spell it: that is where control tokens belong.
    good = write_jsonl({"prompt": "1?", "answer": "1"}, name="good.jsonl")
    assert _stream(good, template="{prompt}<eos>").report.num_used == 1


def test_a_prompt_of_no_tokens_is_refused(write_jsonl):
    path = write_jsonl({"prompt": "1?", "answer": "1"}, {"prompt": "\x00", "answer": "1"})
    with pytest.raises(InputError, match="data:2: the tokenizer makes no token of the prompt"):
        _stream(path)


def test_prompts_with_two_answers_are_counted(write_jsonl):
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in ("a1", "a1", "a2", "b2")]
    assert _stream(write_jsonl(*rows)).report.num_conflicting == 1


def test_all_prompts_come_in_file_order_and_leave_the_cursor(ten_rows):
    stream = _stream(ten_rows, seed=4)
    untouched = _stream(ten_rows, seed=4)
    stream.next_batch()
    assert [(prompt.group_id, prompt.answer) for prompt in stream.all_prompts()] == [
        (n, str(n)) for n in range(10)
    ]
    assert len(stream) == 10
    untouched.next_batch()
    assert _seen(stream.next_batch()) == _seen(untouched.next_batch())
