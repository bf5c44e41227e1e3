"""Settings of the prompts: the questions that a run trains on, and how they become tokens."""

from datetime import date
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from megatron_rl.errors import ConfigError
from megatron_rl.prompts.format_string import template_problem
from megatron_rl.settings import MAY_BE_EMPTY, Settings

OWN_ARGUMENTS = {
    *("messages", "conversation", "add_generation_prompt", "tokenize", "strftime_now"),
    *("chat_template", "return_dict", "return_tensors", "padding", "truncation", "max_length"),
}
"""Arguments of a chat template, and of transformers' call, that a recipe may not give."""


class PromptsConfig(Settings):
    """The data set, its columns, the template and the order."""

    path: str | list[str] = Field(min_length=1)
    """A file (.jsonl, .json, .csv, .parquet), a directory of them, or a data set on the Hugging
    Face hub ("owner/name", or "owner/name:subset"). A list is read in its order."""

    split: str = "train"
    """Split of a hub data set, and of a directory where names of files say their splits."""

    prompt_key: str | None = None
    """Column with the question, as text or as a list of messages; a.b is b within a. None: by the
    layout of the columns (docs/data.md)."""

    answer_key: str | None = None
    """Column with what the verifier compares with, taken as it stands: text, a number, or a list of
    one of them. None: by the layout."""

    response_key: str | None = None
    """Column with the response to imitate; read by supervised training only. None: "response", or
    the assistant's turn of a chat."""

    max_unusable_frac: float = Field(default=0.01, ge=0, lt=1)
    """Largest share of rows that are skipped since they cannot be read or hold no text; with more
    of them the data are refused."""

    template: str | None = Field(default=None, json_schema_extra=MAY_BE_EMPTY)
    """A format string with {prompt}, other braces doubled: "Q: {prompt} Answer in \\boxed{{}}.".
    None: the tokenizer's chat template where it has
    one, with system and instruction; else the prompt as it is."""

    system: str | None = Field(default=None, json_schema_extra=MAY_BE_EMPTY)
    """Text of the chat template's system turn; "": none. None: where the reward is math in a box,
    the text of the paper's code (prompts/template.py), else none. A chat keeps its own."""

    instruction: str | None = Field(default=None, json_schema_extra=MAY_BE_EMPTY)
    """Text of the user's turn of the chat template after the prompt and a space; "": nothing.
    None: where the reward is math in a box, the text of the paper's code; else nothing."""

    default_system: bool = True
    """Let the chat template write a system turn of its own where there is none. False: an empty one
    in its place."""

    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the chat template, for example {enable_thinking: false}."""

    date: str | None = Field(default=None, pattern=r"\d{4}-\d\d-\d\d")
    """Date for a chat template that asks for one, "2026-11-27". None: that of the run's first
    start, in UTC, which its checkpoints and config.yaml keep."""

    add_bos: bool = True
    """Put the tokens in front of a prompt that the tokenizer itself puts in front of a text (BOS),
    unless it begins with them. Never where the chat template is used, which has its own."""

    prompts_per_iteration: int = Field(default=1024, ge=1, le=2**20)
    """Prompts of one iteration, over all ranks; every rank holds all of them."""

    max_prompt_tokens: int = Field(default=1024, ge=1, le=2**24)
    """Longest prompt, in tokens after the template. No model has more than 2**24 positions."""

    overlong: Literal["skip", "error"] = "skip"
    """"skip": longer prompts are counted and left out. "error": they are an error."""

    shuffle: bool = True
    """A new order for every epoch, from the run's seed. False: the order of the file."""

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else tuple(self.path)

    @model_validator(mode="after")
    def _check_paths(self) -> Self:
        if not all(path.strip() for path in self.paths):
            raise ConfigError(
                "prompts.path",
                self.path,
                rule="holds an empty name",
                way_out="Name a .jsonl or .parquet file, a directory, or a hub data set",
            )
        return self

    @model_validator(mode="after")
    def _check_date(self) -> Self:
        try:
            if self.date is not None:
                date.fromisoformat(self.date)
        except ValueError as error:
            raise ConfigError(
                "prompts.date", self.date, rule=f"is no date ({error})", way_out="Write YYYY-MM-DD"
            ) from error
        return self

    @model_validator(mode="after")
    def _check_chat_template_kwargs(self) -> Self:
        if self.template is not None and self.chat_template_kwargs:
            raise ConfigError(
                "prompts.chat_template_kwargs",
                self.chat_template_kwargs,
                rule="has no effect beside prompts.template, which is used as it is",
                way_out="Leave one of them out",
            )
        if taken := OWN_ARGUMENTS & self.chat_template_kwargs.keys():
            raise ConfigError(
                f"prompts.chat_template_kwargs.{min(taken)}",
                self.chat_template_kwargs[min(taken)],
                rule="is given by the run itself",
                way_out="Leave it out; prompts.date sets the date",
            )
        return self

    @model_validator(mode="after")
    def _check_turns(self) -> Self:
        for field in ("system", "instruction"):
            if self.template is not None and getattr(self, field):
                raise ConfigError(
                    f"prompts.{field}",
                    getattr(self, field),
                    rule="has no effect beside prompts.template, which is used as it is",
                    way_out=f"Set prompts.{field}=null and write the text into the template",
                )
        return self

    @model_validator(mode="after")
    def _check_template(self) -> Self:
        if self.template is not None and (broken := template_problem(self.template)):
            raise ConfigError(
                "prompts.template",
                self.template,
                rule=broken,
                way_out="Write {prompt} where the prompt goes and double all other braces",
            )
        return self
