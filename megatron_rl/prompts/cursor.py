"""The cursor of a run in its data: the order of the rows in every epoch, and the place in it."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Draw:
    row: int
    group_id: int  # epoch * num_rows + position in the epoch's order


class Cursor:
    """Walks over rows 0..num_rows-1, epoch after epoch, each in an order of its own."""

    def __init__(self, num_rows: int, seed: int, shuffle: bool) -> None:
        self.num_rows = num_rows
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.position = 0
        self._order = self._order_of(0)

    def take(self, count: int) -> list[Draw]:
        """The next `count` rows; a batch may reach into the next epoch, or over several."""
        draws: list[Draw] = []
        while len(draws) < count:
            if self.position == self.num_rows:
                self.seek(self.epoch + 1, 0)
            end = min(self.num_rows, self.position + count - len(draws))
            first_id = self.epoch * self.num_rows
            draws += [
                Draw(row=int(self._order[position]), group_id=first_id + position)
                for position in range(self.position, end)
            ]
            self.position = end
        return draws

    def seek(self, epoch: int, position: int) -> None:
        """Go to a place; the next row is order[position] of that epoch."""
        if epoch < 0 or not 0 <= position <= self.num_rows:
            raise ValueError(
                f"epoch {epoch}, position {position} is no place in {self.num_rows} rows"
            )
        if epoch != self.epoch:
            self._order = self._order_of(epoch)
        self.epoch, self.position = epoch, position

    def _order_of(self, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        if not self.shuffle:
            return np.arange(self.num_rows, dtype=np.int64)
        # numpy promises that RandomState's stream never changes (a Generator's may), so a run can
        # resume under another numpy. Its seed is a list of 32-bit words.
        seed = self.seed % 2**64
        words = [seed & 0xFFFFFFFF, seed >> 32, epoch & 0xFFFFFFFF, epoch >> 32]
        return np.random.RandomState(words).permutation(self.num_rows).astype(np.int64)
