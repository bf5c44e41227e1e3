"""Placeholders: what sets write into the column of the answer where they have none.

They are known by rules and not by a list, since every set has words of its own. "None", "undefined"
and "no solution" are none of them: they are the right answers to some problems.
"""

import re
import unicodedata

from megatron_rl.reward.markup import without_layout, without_marks

MAX_CHARS = 100
"""A longer text says something."""

_TEXT = re.compile(r"\\(?:text|textrm|mbox|mathrm|operatorname|boxed|fbox)\s*(?=\{)")
_ENDS_A_PROOF = re.compile(r"\\(?:blacksquare|square|Box|qed|qedsymbol|qedhere)(?![a-zA-Z])")
_PROOF_SIGNS = frozenset("\u220e\u25a0\u25a1\u25aa\u25fb\u25fc\u2b1b\u2b1c")
_ELLIPSIS = re.compile(r"\\(?:[lcdvb]?dots[bcimo]?|underline|rule|hrule)(?![a-zA-Z])")
_BRACKETS = ("Ps", "Pe")  # of Unicode's categories
_APART = re.compile(r"[\s{}()\[\]<>$*_\-/\\|~!:;,\"'`]+")

_NOUN = (
    r"(?:(?:final|numeric(?:al)?|short|exact|reference|gold|correct|ground) )*"
    r"(?:answers?|solutions?|results?|values?|labels?|responses?|truth)"
)
_GIVEN = (
    r"(?:found|available|given|applicable|provided|supplied|specified|stated|known|present"
    r"|answered|extracted|extractable|parsed|parsable|recorded|listed|included)"
)
_NEEDED = r"(?:needed|required|necessary|exists?|expected)"
_IS = r"(?:(?:is|are|was|were|has|have|could|can|be|been|yet) ?)*"
_MISSING = (
    r"(?:unknown|unavailable|unanswered|unspecified|missing|omitted|pending|tb[acd]|todo|nan"
    r"|nil|null|to be (?:determined|added|filled in|completed|continued)|placeholder)"
)
_NA = re.compile(r"\W*(?:N[ ./_-]?A|n[./]a)\W*")  # but not "na", which is n times a
_ABSENT = re.compile(
    rf"(?:the )?(?:{_NOUN} ?)?{_IS}(?:not|cannot|no|none|non) ?{_IS}{_GIVEN}(?: here| yet)?"
    rf"|no ?(?:{_GIVEN} )?(?!solutions?|values?|results?){_NOUN}(?: ?{_IS}(?:{_GIVEN}|{_NEEDED}))?"
    rf"|(?:{_NOUN} )?{_IS}{_MISSING}(?: {_NOUN})?"
    rf"|{_NOUN} not {_NEEDED}"
)
_SEE_ELSEWHERE = re.compile(
    r"(?:please |pls |kindly |answer )?(?:see|refer to|cf|consult) .+"
    r"|(?:as|(?:as |hence |thus |so )?(?:shown|given|stated|explained|described)) (?:above|below)"
    r"|(?:solution|explanation|answer|figure|diagram|graph)s? (?:above|below|attached)"
)
_PROOF = re.compile(r"(?:prov(?:e|es|ed|en|ing)|proofs?|qed)")
_BESIDE_A_PROOF = frozenset(
    (
        *("the", "a", "an", "is", "are", "was", "be", "been", "has", "have", "to", "of", "and"),
        *("this", "that", "it", "we", "by", "in", "for", "as", "so", "not", "no", "only", "type"),
        *("answer", "solution", "statement", "claim", "result", "question", "problem", "task"),
        *("see", "above", "below", "given", "provided", "needed", "required", "omitted", "based"),
        *("complete", "completed", "done", "shown", "hence", "thus", "therefore", "desired"),
        *("what", "which", "wanted", "wished", "had", "following", "reader", "left", "q", "e", "d"),
    )
)
# Chinese: a text of nothing but these, with one that says that a proof or the answer is elsewhere.
_ELSEWHERE_CHINESE = re.compile(
    r"[证證][明毕畢]|得[证證]|略|[见見]|暂无|暫無|答案|未[知给給提找]|如[图圖]"
)
_ALL_CHINESE = re.compile(
    r"[证證明毕畢略请請详詳见見如上下图圖所示题題解析答案过程過的文参參考省该該此已得"
    r"暂暫无無未没沒有知给給出提供找到不需要完]+"
)


def is_placeholder(answer: str) -> bool:
    """True where a set says that it has no answer, in whatever case and markup."""
    if len(answer) > MAX_CHARS:
        return False
    text = _TEXT.sub(" ", without_layout(without_marks(answer) or answer)).strip()
    words = _words(text)
    return (
        _is_sign(text)
        or _NA.fullmatch(text) is not None
        or _ABSENT.fullmatch(words) is not None
        or _SEE_ELSEWHERE.fullmatch(words) is not None
        or _is_proof(words)
        or _is_chinese(words.replace(" ", ""))
    )


def _is_sign(text: str) -> bool:
    """True for punctuation alone, such as ? or -- or an ellipsis, and for the end of a proof.

    Brackets are not among it: they may be the empty set.
    """
    rest = _ELLIPSIS.sub(".", _ENDS_A_PROOF.sub(".", text))
    kinds = {
        "P" if char in _PROOF_SIGNS or char in "$\u2212" else unicodedata.category(char)
        for char in rest
        if not char.isspace()
    }
    is_punctuation = bool(kinds) and all(kind[0] == "P" for kind in kinds)
    return is_punctuation and not kinds.intersection(_BRACKETS)


def _words(text: str) -> str:
    """The words alone in lower case; a hyphen, an underscore and a space are the same."""
    plain = unicodedata.normalize("NFKC", text).casefold().replace(".", "")
    plain = "".join(" " if unicodedata.category(char)[0] == "P" else char for char in plain)
    return " ".join(_APART.sub(" ", plain).split())


def _is_proof(words: str) -> bool:
    several = words.split()
    others = [word for word in several if not _PROOF.fullmatch(word)]
    return len(others) < len(several) and _BESIDE_A_PROOF.issuperset(others)


def _is_chinese(text: str) -> bool:
    return bool(_ALL_CHINESE.fullmatch(text)) and _ELSEWHERE_CHINESE.search(text) is not None
