r"""Functions as people type them: sin(x), ln 2, log_2(8), sqrt(2), abs(x) are \sin(x) and so on.

A name is a function where what follows it is an argument: a bracket, a number, a command, or one
letter by itself. Without one the letters are a product of variables, in `lin` and `cost` as well as
in `sinx`: sympy's own reader of typed text does not take these for functions either.
"""

import re

_TRIGONOMETRIC = ("sin", "cos", "tan", "cot", "sec", "csc")
_HYPERBOLIC = ("sin", "cos", "tan")
_SPELLED = {  # as typed -> in LaTeX
    **{name: f"\\{name}" for name in (*_TRIGONOMETRIC, "ln", "log", "exp")},
    **{f"arc{name}": f"\\arc{name}" for name in _TRIGONOMETRIC},
    **{f"a{name}": f"\\arc{name}" for name in _TRIGONOMETRIC},
    **{f"{name}h": f"\\{name}h" for name in _HYPERBOLIC},
    **{f"{arc}{name}h": f"\\ar{name}h" for name in _HYPERBOLIC for arc in ("arc", "ar", "a")},
    "lg": "\\log_{10}",
    "cosec": "\\csc",
}


def _any_of(names: tuple[str, ...]) -> str:
    return "|".join(sorted(names, key=len, reverse=True))


_NAME = _any_of(tuple(_SPELLED))
_WRAPPED = r"\\(?:operatorname\*?|mathrm|text|textrm|mbox)\s*\{\s*"
_BASE = r"(?:\s?_\s?(?P<base>\{[^{}]{1,16}\}|[0-9]{1,4}|[a-z]))?"
_POWER = r"(?:\s?\^\s?(?P<power>\{[^{}]{1,16}\}|\([^()]{1,16}\)|-?[0-9]))?"
_LETTERS = (
    "pi|alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|rho|sigma"
    "|tau|phi|varphi|chi|psi|omega"
)
_VALUE = rf"\\(?:frac|sqrt|binom|lvert|{_LETTERS}|{_NAME})(?![a-zA-Z])"
_ARGUMENT = (
    rf"(?=\s*[({{]|\s*\|[^|]|\s*{_VALUE}|\s+\.?[0-9]|\s+[a-zA-Z](?![a-zA-Z])"
    r"|(?<=[0-9})])[a-zA-Z](?![a-zA-Z])"  # sin^2x
    r"|[0-9]+(?:\.[0-9]+)?(?!\.?[0-9]|\s*\())"  # sin2x
)
_TYPED = re.compile(
    rf"(?:(?<![\\a-zA-Z])(?P<bare>{_NAME})|{_WRAPPED}(?P<wrapped>{_NAME})\s*\}})"
    rf"{_BASE}{_POWER}{_ARGUMENT}"
)
# log2(8) and log10(x) name their base, as in programs; log2 x and log10x may or may not: they are
# not read.
_LOG_OF_BASE = re.compile(r"(?<![\\a-zA-Z])[lL]og(2|10)(?=\s*\()")
_NUMBERED_LOG = re.compile(r"log[0-9]+\s*[0-9a-zA-Z(\\{]")
# In xln(x) the bracket tells that the letter in front is a factor; asin(x) is the arcsine.
_JOINED = re.compile(
    r"(?<![\\a-zA-Z])(?:[b-zA-Z](?=(?:sin|cos|tan)(?:\^\{?-?[0-9]\}?)?\()"
    r"|[a-zA-Z](?=(?:ln|log|exp)(?:\^\{?-?[0-9]\}?)?\())"
)
_SEVERAL = re.compile(  # of several values; 5 min 20 s is a time
    rf"(?:(?<![\\a-zA-Z])(max|min|gcd|lcm)|{_WRAPPED}(max|min|gcd|lcm)\s*\}})(?=\s*\()"
)
_OF_MODULE = re.compile(  # np.arcsin(10/13), as a published answer has it
    rf"(?<![\\a-zA-Z.])(?:np|numpy|math|cmath|sp|sympy)\.(?=(?:{_NAME}|sqrt|abs|floor|ceil)\s*\()"
)
_DECIMAL_LOG = re.compile(r"\\lg(?![a-zA-Z])")

_TYPED_ROOT = re.compile(r"(?<!\\)sqrt(?=\s*[({\[\\0-9]|\s+[a-zA-Z](?![a-zA-Z]))")
_ROOT_OF_DIGITS = re.compile(r"(?<!\\)sqrt\s*([0-9]+(?:\.[0-9]+)?)")
_ROOT_OF_LETTER = re.compile(rf"\\sqrt\s*(\\(?:{_LETTERS}))(?![a-zA-Z])")
_TYPED_FRACTION = re.compile(r"(?<![\\a-zA-Z])[dtc]?frac(?=\s*\{)")
_OF_TWO = "[dtc]?frac|binom(?:ial)?|nCr|comb|choose"
_CALL = re.compile(
    r"(?:\\sqrt\s*(?:(?P<degree>\[[^\[\]]{1,8}\])\s*)?"
    rf"|(?<![\\a-zA-Z])(?P<name>[aA]bs|floor|ceil(?:ing)?|cbrt|factorial|{_OF_TWO})\s*)\("
)
_CHOICES = re.compile(r"(?<![\\a-zA-Z])C\s*\(\s*(\w{1,6})\s*,\s*(\w{1,6})\s*\)")
_POINT = re.compile(r"\([^()]*,[^()]*\)")
_AROUND = {
    "abs": ("|", "|"),
    "floor": ("\\lfloor ", "\\rfloor "),
    "ceil": ("\\lceil ", "\\rceil "),
    "cbrt": ("\\sqrt[3]{", "}"),
    "factorial": ("(", ")!"),
}
_AROUND |= {"Abs": _AROUND["abs"], "ceiling": _AROUND["ceil"]}
_FACTORIAL = re.compile(r"\((\w{1,4})\)!")
# Ln(x) and Sin(x), as some programs write them.
_CAPITAL = re.compile(rf"(?<![\\a-zA-Z])(?!{_NAME}|sqrt)(?i:{_NAME}|sqrt)(?=\s*\(|\s?\^|\s+[0-9])")
_INFINITY = re.compile(
    r"(?<![\\a-zA-Z])(?<![a-zA-Z][ ])(?:(?P<sign>positive|plus|negative|minus)\s+)?"
    r"(?:(?i:infinity|infty|inf)|oo|\\(?:text|mathrm|textrm|mbox|operatorname)\s*\{\s*"
    r"(?P<inner_sign>[+-]?)\s*(?:(?i:infinity|infty|inf)|oo)\s*\})(?!\s*[a-zA-Z])"
)
_TWO_LETTERS = re.compile("[a-zA-Z]{2}")


def with_functions(text: str) -> str:
    r"""The text with its typed functions and roots in LaTeX: `4sqrt(2)` and `4\sqrt(2)`."""
    if _TWO_LETTERS.search(text) is None:
        return text
    text = _INFINITY.sub(_infinity, _CAPITAL.sub(lambda match: match[0].lower(), text))
    text = _LOG_OF_BASE.sub(r"\\log_{\1} ", text)
    text = _TYPED_FRACTION.sub(r"\\frac", _OF_MODULE.sub("", text))
    text = _DECIMAL_LOG.sub(r"\\log_{10}", text)
    if "sqrt" in text:
        text = _TYPED_ROOT.sub(r"\\sqrt", _ROOT_OF_DIGITS.sub(r"\\sqrt{\1}", text))
        text = _ROOT_OF_LETTER.sub(r"\\sqrt{\1}", text)
    text = _SEVERAL.sub(lambda match: f"\\{match[1] or match[2]} ", _without_brackets(text))
    return _TYPED.sub(_in_latex, _JOINED.sub(r"\g<0> ", text))


def _in_latex(match: re.Match[str]) -> str:
    if match["bare"] == "log" and _NUMBERED_LOG.match(match.string, match.start()):
        return match[0]
    name = _SPELLED[match["bare"] or match["wrapped"]]
    base, power = (
        sign + "{" + script.strip("{}()") + "}" if script else ""
        for sign, script in (("_", match["base"]), ("^", match["power"]))
    )
    return f"{name}{base}{power} "


def _infinity(match: re.Match[str]) -> str:
    is_negative = match["sign"] in ("negative", "minus") or match["inner_sign"] == "-"
    return ("-" if is_negative else "") + "\\infty "


def with_choices(text: str, other: str) -> str:
    r"""C(5,2) as \binom{5}{2}, where the other text is no point: C may be the name of one."""
    return text if _POINT.search(other) else _CHOICES.sub(r"\\binom{\1}{\2}", text)


def _without_brackets(text: str) -> str:
    r"""`\sqrt(x)` as `\sqrt{x}`, `abs(x)` as `|x|`; what has no closing bracket stays."""
    calls = {match.end() - 1: match for match in _CALL.finditer(text)}
    if not calls:
        return text
    pieces, open_ones, commas = list(text), list[int](), list[list[int]]()
    for position, char in enumerate(text):
        if char in "({":
            open_ones.append(position)
            commas.append([])
        elif char == "," and commas:
            commas[-1].append(position)
        elif char in ")}" and open_ones:
            opener, between = open_ones.pop(), commas.pop()
            if char == ")" and text[opener] == "(" and (call := calls.get(opener)):
                name = call["name"] or ""
                if re.fullmatch(_OF_TWO, name):
                    if len(between) != 1:
                        continue
                    before, after = f"\\{'frac' if 'frac' in name else 'binom'}{{", "}"
                    pieces[between[0]] = "}{"
                else:
                    root = f"\\sqrt{call['degree'] or ''}{{", "}"
                    before, after = _AROUND.get(name, root)
                pieces[call.start() : opener] = [""] * (opener - call.start())
                pieces[opener], pieces[position] = before, after
    return _FACTORIAL.sub(r"\1!", "".join(pieces))
