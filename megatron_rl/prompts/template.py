"""A question as the model reads it: in the recipe's template, in the chat template, or bare."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from megatron_rl.errors import InputError
from megatron_rl.prompts.clock import FixedClock, today
from megatron_rl.prompts.config import PromptsConfig
from megatron_rl.prompts.tokenizer import Tokenizer

SAMPLE_LIMIT_S = 5.0  # CPU seconds; a template takes a millisecond

# The public code of arXiv:2504.11343 (RLHFlow/Minimal-RL) gives these texts to every model.
MATH_SYSTEM = r"Please reason step by step, and put your final answer within \boxed{}."
MATH_INSTRUCTION = r"Let's think step by step and output the final answer within \boxed{}."


def for_mathematics(config: PromptsConfig) -> PromptsConfig:
    """The config with the paper's texts where the recipe sets none."""
    if config.template is not None:
        return config
    system = MATH_SYSTEM if config.system is None else config.system
    instruction = MATH_INSTRUCTION if config.instruction is None else config.instruction
    return config.model_copy(update={"system": system, "instruction": instruction})


@dataclass(frozen=True, kw_only=True)
class Template:
    """How a row's prompt becomes the text that is encoded, and what is put in front of its ids."""

    render: Callable[[str], str]
    prefix_ids: tuple[int, ...] = ()  # unless the ids begin with them
    date: str | None = None  # that the texts hold; None: the template does not ask for one


def choose_template(config: PromptsConfig, tokenizer: Tokenizer) -> Template:
    """The recipe's template, or the tokenizer's chat template, or the prompt as it is.

    Raises:
        InputError: the chat template fails on a sample, or does not end.
    """
    template = config.template
    prefix_ids = tokenizer.prefix_ids if config.add_bos else ()
    if template is not None:
        return Template(render=lambda prompt: template.format(prompt=prompt), prefix_ids=prefix_ids)
    if tokenizer.has_chat_template:
        return _chat_template(config, tokenizer)
    return Template(render=lambda prompt: prompt, prefix_ids=prefix_ids)


def _chat_template(config: PromptsConfig, tokenizer: Tokenizer) -> Template:
    date = config.date or today()
    clock = FixedClock(date)
    system, suffix = config.system or "", f" {config.instruction}" if config.instruction else ""
    arguments = {**config.chat_template_kwargs, "strftime_now": clock.strftime}

    def render(prompt: str) -> str:
        return tokenizer.render_chat(prompt + suffix, system, **arguments)

    with _deadline():
        render("1+1?")
    return Template(render=render, date=date if clock.was_asked else None)


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
