"""What the tests of bad input share."""

GOOD_ROWS = ({"prompt": "1+1?", "answer": "2"}, {"prompt": "3-1?", "answer": "2"})


def only(problems: list[str]) -> str:
    """The one problem that there is."""
    (problem,) = problems
    return problem
