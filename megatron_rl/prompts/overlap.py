"""Problems that stand in two sets: in what a run trains on and in what it is measured by."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from megatron_rl.types import Prompt

NUM_SHOWN = 3
_MARKUP = re.compile(
    r"\\(?:left|right|displaystyle|quad|qquad|text|textrm|mathrm|textbf|mbox)(?![a-z])"
    r"|\\[,;:!()\[\] ]|[\s$\\{}\"'`]"
)
# What sets write around their problems: DAPO's frame, and requests for the form of the answer.
_FRAME = re.compile(
    r"^\s*solve the following math problem step by step\.[^\n]{0,300}\n"
    r"|\n\s*remember to put your answer on its own line after [^\n]{0,40}$"
    r"|(?:please,? )?(?:let's )?(?:reason|think) step by step,? (?:and|then) [^\n]{0,40}"
    r"final answer [^\n]{0,40}$"
)
_FRACTION = re.compile(r"\\[dtc]frac(?![a-z])")
_SAME = str.maketrans({"\u2212": "-", "\u2013": "-", "\u2019": "'", "\u201c": '"', "\u201d": '"'})


def normalised(text: str) -> str:
    r"""A problem without what two copies of it often differ in, so that they are equal.

    That is case, white space, signs of mathematics mode, braces, quotation marks, commands of
    layout, sizes of fractions, forms of characters, the sign at the end, and what a set writes
    around all of its problems: "Find $x^2$!" and "find x^{2}" are both "findx^2". Operators stay:
    7 + 52 is another problem than 75 + 2.
    """
    plain = unicodedata.normalize("NFKC", text).casefold().translate(_SAME)
    plain = _FRACTION.sub(r"\\frac", _FRAME.sub(" ", plain.strip()))
    return _MARKUP.sub("", plain).rstrip(".?!:")


def overlaps(
    trained_on: Sequence[str],
    benchmarks: Mapping[str, Sequence[Prompt]],
    leaving_out: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """A line for each benchmark of which questions are also trained on; none where there are none.

    trained_on: the questions, without template.
    leaving_out: the command that leaves those of a benchmark out.
    """
    if not benchmarks:
        return []
    exact = set(trained_on)
    near = {normalised(text) for text in exact}
    lines = []
    for name, prompts in benchmarks.items():
        same = [prompt for prompt in prompts if prompt.text in exact]
        alike = [
            prompt
            for prompt in prompts
            if prompt.text not in exact and normalised(prompt.text) in near
        ]
        if same or alike:
            shown = ", ".join(str(prompt.group_id + 1) for prompt in (same + alike)[:NUM_SHOWN])
            lines.append(
                f"contamination: {len(same) + len(alike)} of {len(prompts)} questions of {name} "
                f"are also trained on ({len(same)} to the letter, {len(alike)} but for spacing and "
                f"signs), such as its rows {shown}"
                + (f". `{leaving_out[name]}` leaves them out" if name in leaving_out else "")
            )
    return lines
