r"""Marks that change how an answer looks and not what it says: bold, colour, code spans, layout.

They come as Markdown (**73**), as HTML (<b>73</b>) and as LaTeX (\color{blue}{73}, \mathbf{73}).
"""

import re

# Around the whole text; a single star or underscore means something anywhere else.
_MARKED = re.compile(r"(\*{1,3}|_{1,3})(?=[^\s*_])([^*_]*[^\s*_])\1\.?", re.DOTALL)
# Within a text as well, but 2**3 is a power: the stars have to stand around a word, as in Markdown.
_BOLD = re.compile(
    r"(?:^|(?<=[\s=:,;({\[$]))\*\*(?=[^\s*])([^*]*[^\s*])\*\*(?=$|[\s=:,;.)}\]$])", re.DOTALL
)
_ELEMENT = re.compile(r"<(b|i|u|em|strong|code|mark|span|font)(?: [^<>]*)?>([^<>]*)</\1>")

_OPTION = r"(?:\s*\[[^\[\]]{0,64}\])?"
_GIVEN = r"\s*\{[^{}]{0,64}\}"
_COLOR = rf"\\(?:text)?color{_OPTION}{_GIVEN}"
# Commands whose last argument is what they show.
_STYLED = re.compile(
    r"\\(?:(?:mathbf|mathit|mathsf|mathtt|mathnormal|mathop|mathord|mathclap|boldsymbol|bm|pmb"
    r"|textbf|textit|textsf|texttt|textsl|textsc|emph|underline|ensuremath|smash)\s*"
    rf"|(?:text)?color{_OPTION}{_GIVEN}\s*|(?:colorbox|scalebox){_OPTION}{_GIVEN}\s*"
    rf"|fcolorbox{_GIVEN}{_GIVEN}\s*|(?:style|class){_GIVEN}\s*|bbox{_OPTION}\s*)(?=\{{)"
)
# Commands that hold until their group ends.
_SWITCH = (
    r"\\(?:bf|it|sl|sf|sc|tt|em|bfseries|itshape|upshape|boldmath|tiny|scriptsize|footnotesize"
    r"|small|normalsize|large|Large|LARGE|huge|Huge)(?![a-zA-Z])"
)
_SWITCHED_GROUP = re.compile(
    rf"(?<![\^_}}\]a-zA-Z])\{{\s*(?:(?:{_SWITCH}|{_COLOR})\s*)+([^{{}}]*)\}}"
)
_UPRIGHT_GROUP = re.compile(r"\{\s*\\rm(?![a-zA-Z])\s*([^{}\\]*)\}")
_UPRIGHT_TEXT = re.compile(r"\\(?:textnormal|textup|hbox)(?=\s*\{)")
_LAYOUT = re.compile(
    rf"{_SWITCH}|{_COLOR}|\\rm(?![a-zA-Z])"
    r"|\\(?:displaystyle|textstyle|scriptstyle|scriptscriptstyle|limits|nolimits|left|right|middle"
    r"|[bB]igg?[lrm]?|quad|qquad|enspace|thinspace|medspace|thickspace|space|hfill|hfil|strut"
    r"|mathstrut|nonumber|notag|noindent|centering|allowbreak|nobreak|relax)(?![a-zA-Z])"
    r"|\\(?:[hv]?phantom|[hvm]space\*?|tag\*?|label)\s*\{[^{}]*\}"
    r"|\\(?:hskip|kern|mkern|mskip)\s*-?[0-9.]+\s*(?:pt|em|ex|mu|cm|mm|in)(?![a-zA-Z])"
    r"|(?<!\\)\\[ ,;:>]|~"
)
_COMMAND_AT_END = re.compile(r"\\[a-zA-Z]+\s?\Z")


def without_marks(text: str) -> str:
    """The text without Markdown's and HTML's marks; `**` between factors still is a power."""
    if "*" in text or "_" in text:
        text = text.strip()
        while match := _MARKED.fullmatch(text):
            text = match[2]
        text = _BOLD.sub(r"\1", text)
    if "</" in text:
        text = _ELEMENT.sub(r"\2", text)
    return text.replace("`", "")


def without_layout(text: str) -> str:
    """The text without LaTeX's commands of layout, colour and weight, which leave spaces."""
    if "\\" in text:
        text = _UPRIGHT_GROUP.sub(r"\\mathrm{\1}", _SWITCHED_GROUP.sub(r"\1", text))
        text = _UPRIGHT_TEXT.sub(r"\\text", _unstyled(text))
    return _LAYOUT.sub(" ", text)


def _unstyled(text: str) -> str:
    """What styled commands show, in their place."""
    commands = list(_STYLED.finditer(text))
    if not commands:
        return text
    pieces, closers = list(text), _closing_braces(text)
    for command in commands:
        opener, closer = command.end(), closers.get(command.end())
        if closer is None:
            continue
        pieces[command.start() : opener] = [""] * (opener - command.start())
        before = text[: command.start()]
        if before.rstrip().endswith(("^", "_")):
            continue  # x^\mathbf{12} is x^{12}
        # A command in front, or at the end of what is shown, must not run into the next letter.
        pieces[opener] = " " if _COMMAND_AT_END.search(before) else ""
        pieces[closer] = " " if _COMMAND_AT_END.search(text[opener + 1 : closer]) else ""
    return "".join(pieces)


def _closing_braces(text: str) -> dict[int, int]:
    """Position of each opening brace -> position of the one that closes it."""
    closers, open_ones, is_escaped = dict[int, int](), list[int](), False
    for position, char in enumerate(text):
        if char == "{" and not is_escaped:
            open_ones.append(position)
        elif char == "}" and not is_escaped and open_ones:
            closers[open_ones.pop()] = position
        is_escaped = char == "\\" and not is_escaped
    return closers
