"""Lines that compiled code writes to stderr, past every logger, and that ask nothing of a user."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unsaid(part: bytes) -> Iterator[None]:
    """Keep lines with this part off stderr, whoever writes them; the others come at the end."""
    sys.stderr.flush()
    descriptor = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(descriptor, 2)
            os.close(descriptor)
            caught.seek(0)
            for line in caught.read().splitlines(keepends=True):
                if part not in line:
                    os.write(2, line)
