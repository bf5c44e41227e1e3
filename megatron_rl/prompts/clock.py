"""The date that a chat template may ask for: one for a whole run, not that of the clock.

Templates such as Llama 3.2's write `strftime_now("%d %b %Y")` into the system turn. By the clock a
run would train on other prompts after midnight, and could not be resumed on another day.
"""

from datetime import UTC, datetime

# strftime would take them from the locale.
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)


def today() -> str:
    """The date in UTC, so that machines in several time zones have one."""
    return datetime.now(UTC).date().isoformat()


class FixedClock:
    """Stands in the place of transformers' strftime_now; it is always midnight of one day."""

    def __init__(self, date: str) -> None:
        """date: as ISO 8601 has it, "2026-11-27"."""
        self._at = datetime.fromisoformat(date)
        day, month = _DAYS[self._at.weekday()], _MONTHS[self._at.month - 1]
        self._names = {"%A": day, "%a": day[:3], "%B": month, "%b": month[:3]}
        self.was_asked = False

    def strftime(self, form: str) -> str:
        """The date in this form, with English names of days and months."""
        self.was_asked = True
        for directive, name in self._names.items():
            form = form.replace(directive, name)
        return self._at.strftime(form)
