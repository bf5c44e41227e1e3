"""The format string of prompts.template."""

from string import Formatter


def template_problem(template: str) -> str | None:
    """What is wrong with it; None where it has the field {prompt} and no other."""
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
