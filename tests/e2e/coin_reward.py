"""A reward that a random model earns half of the time."""


def is_even(response: str, answer: str) -> bool:
    return sum(response.encode()) % 2 == 0
