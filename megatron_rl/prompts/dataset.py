"""The prompts of a run: read, checked and tokenized once, then handed out batch by batch."""

import hashlib
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from megatron_rl.errors import InputError
from megatron_rl.prompts.config import PromptsConfig
from megatron_rl.prompts.cursor import Cursor, Draw
from megatron_rl.prompts.rows import MAX_SHOWN, LeftOut, Problems, Row, preview
from megatron_rl.prompts.source import RowsRead, read_rows
from megatron_rl.prompts.template import NO_TEXTS, Template, Texts, choose_template
from megatron_rl.prompts.token_table import TokenTable, tokenize
from megatron_rl.prompts.tokenizer import Tokenizer
from megatron_rl.types import Prompt

MOST_CHARS_SHOWN = 600
PREPARED = ("--output", "prepared.jsonl")
"""Where a command that we suggest writes its prompts."""


class PromptState(TypedDict):
    """The state of a stream in a checkpoint."""

    epoch: int
    position: int
    num_rows: int
    checksum: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptReport:
    """The numbers of rows of a data set that are used or left out, and why."""

    num_read: int
    num_used: int
    layouts: Mapping[str, Sequence[str]]  # a layout with its columns -> the files that have it
    notes: tuple[str, ...]  # on files of a directory that are not read
    left_out: Mapping[str, LeftOut]  # by reason: the set itself has no answer there
    unusable: Sequence[str]  # the first few of the rows that were skipped, with what is wrong
    num_unusable: int
    num_own_system: int  # chats with a system turn of their own
    own_system: str  # that the chat template writes where there is none; "": it writes none
    num_overlong: int  # left out, since longer than max_prompt_tokens
    overlong_rows: tuple[str, ...]  # the first few of them, as source:line
    num_hopeless: int  # left out, since no response could be right by the row's answer
    hopeless_rows: tuple[str, ...]  # the first few of them, as "source:line: why"
    num_conflicting: int  # used, though an earlier row has the same prompt with another answer
    max_prompt_tokens: int  # length of the longest prompt in use
    mean_prompt_tokens: float
    max_gold_tokens: int  # length of the longest gold response with its end; 0 without gold


class PromptStream:
    """Batches of prompts in a seeded order; the same on every rank, resumable after any batch.

    Needs no process group: each rank reads the same files and takes the same global batch.
    Without shuffling, and through all_prompts(), it also serves evaluations.
    """

    def __init__(
        self,
        config: PromptsConfig,
        tokenizer: Tokenizer,
        seed: int,
        with_gold: bool = False,
        find_hopeless: Callable[[Sequence[str]], Mapping[str, str]] | None = None,
        *,
        is_benchmark: bool = False,
        texts: Texts = NO_TEXTS,
    ) -> None:
        """Args:
        find_hopeless: answer -> why, for each answer by which no response could be right.
        is_benchmark: prompts over the limit are an error: with fewer it is another benchmark.
        texts: what goes around questions where the recipe says nothing.
        """
        read = read_rows(config, with_gold, is_benchmark=is_benchmark)
        _refuse_nothing(read, config)
        rows, hopeless = _gradable(read.rows, find_hopeless, config)
        template = choose_template(config, tokenizer, texts)
        self._template = template
        self.date = template.date
        """The date that the prompts hold; None: the template does not ask for one."""
        _refuse_chats(rows, template, config)
        most_frac = 0.0 if is_benchmark else config.max_unusable_frac
        rows = _without_control_tokens(rows, tokenizer, read.unusable)
        rendered = (template.render(row.prompt, row.chat) for row in rows)
        table = tokenize(tokenizer, rendered, prefix=template.prefix_ids)
        empty = _note_empty(rows, table.lengths(), len(template.prefix_ids), read.unusable)
        read.unusable.raise_if_more(most_frac, read.num_read)
        rows, table = _without(empty, rows, table)
        lengths = table.lengths()
        fits = [index for index, length in enumerate(lengths) if length <= config.max_prompt_tokens]
        overlong = [index for index, n in enumerate(lengths) if n > config.max_prompt_tokens]
        _check_overlong(
            [rows[index] for index in overlong],
            max(lengths, default=0),
            len(fits),
            config,
            is_benchmark=is_benchmark,
        )

        self._rows = [rows[index] for index in fits] if overlong else rows
        self._prompts = table.select(fits) if overlong else table
        self._gold = _gold_table(self._rows, tokenizer) if with_gold else None
        self._batch_size = config.prompts_per_iteration
        self._batch: list[Prompt] = []
        self._cursor = Cursor(len(self._rows), seed, config.shuffle)
        self._checksum = _checksum(self._rows, self._prompts, self._gold)
        used = [lengths[index] for index in fits]
        self.report = PromptReport(
            num_read=read.num_read,
            num_used=len(used),
            layouts=read.layouts,
            notes=tuple(read.notes),
            left_out=read.left_out,
            unusable=read.unusable.shown,
            num_unusable=read.unusable.num_problems,
            num_own_system=sum(_has_system(row) for row in self._rows),
            own_system=template.own_system,
            num_overlong=len(overlong),
            overlong_rows=tuple(rows[index].where for index in overlong[:MAX_SHOWN]),
            num_hopeless=len(hopeless),
            hopeless_rows=tuple(hopeless[:MAX_SHOWN]),
            num_conflicting=_count_conflicting(self._rows),
            max_prompt_tokens=max(used),
            mean_prompt_tokens=sum(used) / len(used),
            max_gold_tokens=0 if self._gold is None else max(self._gold.lengths()),
        )

    def __len__(self) -> int:
        return len(self._rows)

    def next_batch(self) -> list[Prompt]:
        """The next prompts_per_iteration prompts; group ids increase and never repeat in a run."""
        self._batch = []
        return self.more(self._batch_size)

    def more(self, count: int) -> list[Prompt]:
        """So many further prompts of the same batch."""
        taken = [self._prompt(draw) for draw in self._cursor.take(count)]
        self._batch += taken
        return taken

    @property
    def batch(self) -> list[Prompt]:
        """All prompts since next_batch() was called last, in their order."""
        return list(self._batch)

    def first_answers(self, count: int) -> list[str]:
        """The answers of the first rows in use."""
        return [row.answer for row in self._rows[:count] if row.answer]

    @property
    def questions(self) -> list[str]:
        """The questions in use, without template."""
        return [row.prompt for row in self._rows]

    def first_text(self, tokenizer: Tokenizer) -> str:
        """The first prompt as the model reads it."""
        return tokenizer.decode(self._prompts.tokens(0).tolist(), skip_special=False)

    def shown_first(self, tokenizer: Tokenizer) -> list[str]:
        """The first prompt as the model reads it, in two lines: for a person to look at."""
        ids = self._prompts.tokens(0).tolist()
        text = self.first_text(tokenizer)
        return [
            f"first prompt, {len(ids)} tokens: {_shortened(repr(text), MOST_CHARS_SHOWN)}",
            f"  ids {_shortened(', '.join(map(str, ids)), MOST_CHARS_SHOWN)}",
        ]

    @property
    def place(self) -> int:
        """The group id of the next prompt."""
        return self._cursor.epoch * len(self) + self._cursor.position

    def batch_at(self, place: int) -> list[Prompt]:
        """What next_batch() gives where `place` is this, for a stream that follows another one."""
        self._cursor.seek(*divmod(place, len(self)))
        return self.next_batch()

    def peek(self, place: int, count: int) -> list[Prompt]:
        """So many prompts from a place on; next_batch() is not affected."""
        here = self.place
        self._cursor.seek(*divmod(place, len(self)))
        found = [self._prompt(draw) for draw in self._cursor.take(count)]
        self._cursor.seek(*divmod(here, len(self)))
        return found

    def all_prompts(self) -> list[Prompt]:
        """Every prompt once, in the order of the files; next_batch() is not affected."""
        return [self._prompt(Draw(row=index, group_id=index)) for index in range(len(self))]

    def state_dict(self) -> PromptState:
        return {
            "epoch": self._cursor.epoch,
            "position": self._cursor.position,
            "num_rows": len(self),
            "checksum": self._checksum,
        }

    def load_state_dict(self, state: PromptState) -> None:
        """Go on where state_dict() was taken; InputError where the data are not the same."""
        if state["checksum"] != self._checksum:
            raise InputError(
                f"prompts.path: the data are not those the run was saved with: {len(self)} usable "
                f"rows now, {state['num_rows']} then; checksum {self._checksum} now, "
                f"{state['checksum']} then. Resume with the same files, columns, template, "
                "max_prompt_tokens and tokenizer, or start a new run"
            )
        self._cursor.seek(state["epoch"], state["position"])

    def _prompt(self, draw: Draw) -> Prompt:
        row = self._rows[draw.row]
        return Prompt(
            group_id=draw.group_id,
            tokens=self._prompts.tokens(draw.row),
            answer=row.answer,
            source=row.source,
            text=row.prompt,
            gold_tokens=None if self._gold is None else self._gold.tokens(draw.row),
            opens_thought=self._template.opens_thought(row.prompt),
        )


def _shortened(text: str, most: int) -> str:
    """The text, or its beginning and its end."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


def _gradable(
    rows: Sequence[Row],
    find_hopeless: Callable[[Sequence[str]], Mapping[str, str]] | None,
    config: PromptsConfig,
) -> tuple[Sequence[Row], list[str]]:
    """The rows whose answer can be met, and for each other row "source:line: why"."""
    if find_hopeless is None:
        return rows, []
    problems = find_hopeless([row.answer for row in rows])
    kept = [row for row in rows if row.answer not in problems]
    hopeless = [
        f"{row.where}: {preview(row.answer)}: {problems[row.answer]}"
        for row in rows
        if row.answer in problems
    ]
    if not kept:
        command = ("megatron-rl", "prepare", "--dataset", *config.paths, *PREPARED)
        raise InputError(
            f"prompts.answer_key: no response could be right by any of the {len(rows)} answers. "
            f"The first: {hopeless[0]}. Name the column that holds the answers alone, or have a "
            f"file of prompts made: {shlex.join(command)}"
        )
    return kept, hopeless


def _has_system(row: Row) -> bool:
    return any(role == "system" for role, _ in row.chat or ())


def _refuse_nothing(read: RowsRead, config: PromptsConfig) -> None:
    """Refuse data of which no row is left, with the reasons."""
    if read.rows:
        return
    reasons = [
        f"  {left.count} of {read.num_read}: {reason}, such as {'; '.join(left.examples)}"
        for reason, left in read.left_out.items()
    ]
    way_out = "Name the column that holds the answers with prompts.answer_key"
    raise InputError(
        "\n".join([f"prompts.path={config.path!r}: no row is left", *reasons, way_out])
    )


def _refuse_chats(rows: Sequence[Row], template: Template, config: PromptsConfig) -> None:
    """Refuse chats of several turns where only the text of one can be used."""
    if template.of_chat is not None:
        return
    chat = next((row for row in rows if row.chat is not None and len(row.chat) > 1), None)
    if chat is not None:
        roles = ", ".join(role for role, _ in chat.chat or ())
        why, way_out = "the tokenizer has no chat template", "Name a model that has one"
        if config.template is not None:
            why = "prompts.template takes the text of one turn"
            way_out = "Leave prompts.template out"
        raise InputError(
            f"prompts.path: {chat.where} is a chat of several turns ({roles}), and {why}. "
            f"{way_out}, or keep the user's turn alone in the data"
        )


def _without_control_tokens(
    rows: Sequence[Row], tokenizer: Tokenizer, problems: Problems
) -> list[Row]:
    """The rows that spell no control token, by which they could end a turn or a sequence."""
    if not tokenizer.control_tokens:
        return list(rows)
    control = re.compile("|".join(map(re.escape, tokenizer.control_tokens)))
    kept = []
    for row in rows:
        texts = [row.prompt, row.response or "", *(text for _, text in row.chat or ())]
        found = next(filter(None, map(control.search, texts)), None)
        if found is None:
            kept.append(row)
        else:
            problems.add(row.where, f"spells the tokenizer's control token {found.group()!r}")
    return kept


def _note_empty(
    rows: Sequence[Row], lengths: Sequence[int], num_in_front: int, problems: Problems
) -> set[int]:
    """The places of rows of which the tokenizer makes no token."""
    empty = {index for index, length in enumerate(lengths) if length <= num_in_front}
    for index in sorted(empty):
        problems.add(rows[index].where, "the tokenizer makes no token of the prompt")
    return empty


def _without(
    places: set[int], rows: Sequence[Row], table: TokenTable
) -> tuple[Sequence[Row], TokenTable]:
    if not places:
        return rows, table
    kept = [index for index in range(len(rows)) if index not in places]
    return [rows[index] for index in kept], table.select(kept)


def _check_overlong(
    overlong: Sequence[Row],
    longest: int,
    num_fitting: int,
    config: PromptsConfig,
    *,
    is_benchmark: bool,
) -> None:
    if num_fitting == 0:
        raise InputError(
            f"prompts.path={config.path!r}: all {len(overlong)} prompts are longer than "
            f"prompts.max_prompt_tokens={config.max_prompt_tokens}. Set "
            f"prompts.max_prompt_tokens={longest}, or more"
        )
    if overlong and (is_benchmark or config.overlong == "error"):
        problems = Problems("prompts.path")
        for row in overlong:
            problems.add(row.where, f"longer than max_prompt_tokens={config.max_prompt_tokens}")
        problems.raise_if_any(
            f"Set prompts.max_prompt_tokens={longest}"
            + ("" if is_benchmark else ", or set prompts.overlong=skip")
        )


def _gold_table(rows: Sequence[Row], tokenizer: Tokenizer) -> TokenTable:
    responses = (row.response or "" for row in rows)
    return tokenize(tokenizer, responses, suffix=tokenizer.eos_ids[:1])


def _count_conflicting(rows: Sequence[Row]) -> int:
    first_answers: dict[str, str] = {}
    return sum(first_answers.setdefault(row.prompt, row.answer) != row.answer for row in rows)


def _checksum(rows: Sequence[Row], prompts: TokenTable, gold: TokenTable | None) -> str:
    """A digest of all that the run sees: files may be moved or converted, but not changed."""
    digest = hashlib.blake2b(digest_size=16)
    for table in (prompts, gold):
        if table is not None:
            digest.update(table.ends.tobytes())
            digest.update(table.ids.tobytes())
    for row in rows:
        digest.update(f"{len(row.answer)}:{row.answer}".encode())
    return digest.hexdigest()
