"""What the model reads of a question: the recipe's template, else the chat template, else it."""

from collections.abc import Callable

from megatron_rl.prompts.tokenizer import Tokenizer

Render = Callable[[str], str]


def choose_template(template: str | None, tokenizer: Tokenizer) -> Render:
    """The function from a row's prompt to the text that is encoded."""
    if template is not None:
        return lambda prompt: template.format(prompt=prompt)
    if tokenizer.has_chat_template:
        return tokenizer.render_chat
    return lambda prompt: prompt
