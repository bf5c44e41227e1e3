"""Settings of the prompts: the questions that a run trains on, and how they become tokens."""

from string import Formatter
from typing import Literal, Self

from pydantic import Field, model_validator

from megatron_rl.errors import ConfigError
from megatron_rl.settings import Settings


class PromptsConfig(Settings):
    """The data set, its columns, the template and the order."""

    path: str | list[str] = Field(min_length=1)
    """A .jsonl or .parquet file, a directory of them, or a data set on the Hugging Face hub
    ("owner/name", or "owner/name:subset"). A list is read in its order."""

    split: str = "train"
    """Split of a hub data set; it has no effect on files."""

    prompt_key: str = "prompt"
    """Column with the question, as text."""

    answer_key: str = "answer"
    """Column with what the verifier compares with: text, a number, or a list of one of them."""

    response_key: str = "response"
    """Column with the response to imitate; read by supervised training only."""

    template: str | None = None
    """A format string with {prompt}, other braces doubled: "Q: {prompt} Answer in \\boxed{{}}.".
    It is the only thing that adds special tokens. None: the tokenizer's chat template where it has
    one, with system and instruction; else the prompt as it is."""

    system: str | None = None
    """Text of the chat template's system turn; "": there is none. None: where reward.kind is math,
    the text of the paper's code (prompts/template.py); else there is none."""

    instruction: str | None = None
    """Text of the user's turn of the chat template after the prompt and a space; "": nothing.
    None: where reward.kind is math, the text of the paper's code; else nothing."""

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
    def _check_turns(self) -> Self:
        for field in ("system", "instruction"):
            if self.template is not None and getattr(self, field):
                raise ConfigError(
                    f"prompts.{field}",
                    getattr(self, field),
                    rule="has no effect beside prompts.template, which is used as it is",
                    way_out="Write the text into the template, or leave one of them out",
                )
        return self

    @model_validator(mode="after")
    def _check_template(self) -> Self:
        if self.template is not None and (broken := _template_problem(self.template)):
            raise ConfigError(
                "prompts.template",
                self.template,
                rule=broken,
                way_out="Write {prompt} where the prompt goes and double all other braces",
            )
        return self


def _template_problem(template: str) -> str | None:
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        return f"is not a format string ({error})"
    fields = [part[1:] for part in parts if part[1] is not None]
    others = sorted({str(name) for name, _, _ in fields if name != "prompt"})
    if others:
        return f"has fields other than {{prompt}}: {', '.join(map(repr, others))}"
    if any(spec or conversion for _, spec, conversion in fields):
        return "has a conversion or a format after the field's name"
    return None if fields else "does not contain {prompt}"
