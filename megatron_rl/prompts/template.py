"""A question as the model reads it: in the recipe's template, in the chat template, or bare."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import FrameType
from typing import Any

from megatron_rl.errors import InputError
from megatron_rl.prompts.clock import FixedClock, today
from megatron_rl.prompts.config import PromptsConfig
from megatron_rl.prompts.rows import Chat
from megatron_rl.prompts.tokenizer import Tokenizer

THOUGHT = "<think>"
SAMPLE = "1+1?"
SAMPLE_LIMIT_S = 5.0  # CPU seconds; a template takes a millisecond

# The public code of arXiv:2504.11343 (RLHFlow/Minimal-RL) gives these texts to every model.
MATH_SYSTEM = r"Please reason step by step, and put your final answer within \boxed{}."
MATH_INSTRUCTION = r"Let's think step by step and output the final answer within \boxed{}."


@dataclass(frozen=True, slots=True)
class Texts:
    """What a question that is text gets around it where the recipe says nothing."""

    system: str = ""
    instruction: str = ""


NO_TEXTS = Texts()
FOR_MATHEMATICS = Texts(MATH_SYSTEM, MATH_INSTRUCTION)


@dataclass(frozen=True, kw_only=True)
class Template:
    """How a row's prompt becomes the text that is encoded, and what is put in front of its ids."""

    of_text: Callable[[str], str]
    of_chat: Callable[[Chat], str] | None = None  # None: it takes the text of one turn alone
    prefix_ids: tuple[int, ...] = ()  # unless the ids begin with them
    date: str | None = None  # that the texts hold; None: the template does not ask for one
    own_system: str = ""  # system turn that the chat template writes where it is given none

    def opens_thought(self, prompt: str) -> bool:
        """True where a question's text ends in an opened thought, in which the response starts.

        The chat templates of R1's distillations and of QwQ end so.
        """
        return f"{prompt}{self._behind}".rstrip().endswith(THOUGHT)

    @cached_property
    def _behind(self) -> str:
        """What stands behind every question."""
        return self.of_text(SAMPLE).rpartition(SAMPLE)[2]

    def render(self, prompt: str, chat: Chat | None = None) -> str:
        """The text of a question, or of a chat that ends in one."""
        if chat is not None and self.of_chat is not None:
            return self.of_chat(chat)
        return self.of_text(prompt)


def choose_template(
    config: PromptsConfig, tokenizer: Tokenizer, texts: Texts = NO_TEXTS
) -> Template:
    """The recipe's template, or the tokenizer's chat template, or the prompt as it is.

    Raises:
        InputError: the chat template fails on a sample, or does not end.
    """
    template = config.template
    prefix_ids = tokenizer.prefix_ids if config.add_bos else ()
    if template is not None:
        return Template(
            of_text=lambda prompt: template.format(prompt=prompt), prefix_ids=prefix_ids
        )
    if tokenizer.has_chat_template:
        return _chat_template(config, tokenizer, texts)
    return Template(of_text=lambda prompt: prompt, prefix_ids=prefix_ids)


def _chat_template(config: PromptsConfig, tokenizer: Tokenizer, texts: Texts) -> Template:
    date = config.date or today()
    clock = FixedClock(date)
    arguments = {**config.chat_template_kwargs, "strftime_now": clock.strftime}

    def render(chat: Chat, is_ours: bool = True) -> str:
        try:
            return tokenizer.render_chat(chat, **arguments)
        except InputError as error:
            way_out = "Mend it, or use none: set prompts.template='{prompt}'"
            if _works(tokenizer, _without_system(chat), arguments):
                way_out = "It takes no system turn: " + (
                    "set prompts.system=''" if is_ours else "take it out of the data"
                )
            raise InputError(f"{error}. {way_out}") from error

    def of_text(prompt: str) -> str:
        system = texts.system if config.system is None else config.system
        instruction = texts.instruction if config.instruction is None else config.instruction
        return render((*opening(system), ("user", _with_instruction(prompt, instruction))))

    def of_chat(chat: Chat) -> str:
        # A chat says all that its authors want said: of ours it gets what the recipe itself names.
        *before, (role, question) = chat
        has_system = any(role == "system" for role, _ in before)
        last = (role, _with_instruction(question, config.instruction or ""))
        front = () if has_system else opening(config.system or "")
        return render((*front, *before, last), is_ours=not has_system)

    def opening(system: str) -> Chat:
        # An empty system turn keeps a template from writing its own.
        return (("system", system),) if system or not config.default_system else ()

    with _deadline():
        of_text(SAMPLE)
        own_system = _own_system(render)
    return Template(
        of_text=of_text,
        of_chat=of_chat,
        date=date if clock.was_asked else None,
        own_system=own_system,
    )


def _without_system(chat: Chat) -> Chat:
    return tuple(turn for turn in chat if turn[0] != "system")


def _works(tokenizer: Tokenizer, chat: Chat, arguments: Mapping[str, Any]) -> bool:
    try:
        tokenizer.render_chat(chat, **arguments)
    except InputError:
        return False
    return True


def _with_instruction(prompt: str, instruction: str) -> str:
    return f"{prompt} {instruction}" if instruction else prompt


def _own_system(render: Callable[[Chat], str]) -> str:
    """The system turn that a chat template writes where it is given none, such as Qwen2.5's.

    It is what stands in the place of one that is given.
    """
    question, mark = ("user", SAMPLE), "\x1f"  # no template writes this character
    try:
        given, bare = render((("system", mark), question)), render((question,))
    except InputError:
        return ""  # it takes no system turn
    before, found, after = given.partition(mark)
    has_own = found and bare.startswith(before) and bare.endswith(after)
    return bare[len(before) : len(bare) - len(after)].strip() if has_own else ""


class _TooSlowError(Exception):
    pass


@contextmanager
def _deadline() -> Iterator[None]:
    """Stop a chat template, which is a program of others, that uses too much CPU time.

    Signals reach the main thread alone; in another one there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _raise_too_slow)
    signal.setitimer(signal.ITIMER_VIRTUAL, SAMPLE_LIMIT_S)
    try:
        yield
    except _TooSlowError as error:
        raise InputError(
            f"the tokenizer's chat template still ran after {SAMPLE_LIMIT_S:g} s on a sample "
            "prompt: it may never end. Mend it, or set prompts.template"
        ) from error
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _raise_too_slow(number: int, frame: FrameType | None) -> None:
    raise _TooSlowError
