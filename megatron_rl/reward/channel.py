"""Messages between the trainer and a reward worker: each is a length and JSON, never a pickle.

A pickle from a process that ran foreign code would be a way into the trainer. JSON's escapes carry
every string that a tokenizer can decode, with lone surrogates and NUL.
"""

import json
import socket
import struct
from typing import Any

Message = dict[str, Any]

MAX_REPLY_BYTES = 1 << 16

_LENGTH = struct.Struct("<I")


def encode(message: Message) -> bytes:
    body = json.dumps(message).encode("ascii")
    return _LENGTH.pack(len(body)) + body


def receive(connection: socket.socket) -> Message | None:
    """The next message of a blocking socket, or None where the socket has ended."""
    header = _receive_exactly(connection, _LENGTH.size)
    body = header and _receive_exactly(connection, _LENGTH.unpack(header)[0])
    return json.loads(body) if body else None


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = connection.recv(min(size - len(data), 1 << 20))
        if not part:
            return b""
        data += part
    return bytes(data)


class Frames:
    """Cuts the bytes that arrive on a non-blocking socket into messages."""

    def __init__(self) -> None:
        self._data = bytearray()
        self.is_garbled = False
        """True: bytes have come that no worker sends, and nothing behind them can be read."""

    def feed(self, data: bytes) -> list[Message]:
        """The messages that these bytes complete, up to the first bytes that no worker sends."""
        self._data += data
        messages: list[Message] = []
        while len(self._data) >= _LENGTH.size and not self.is_garbled:
            (size,) = _LENGTH.unpack_from(self._data)
            end = _LENGTH.size + size
            if size > MAX_REPLY_BYTES:
                self.is_garbled = True
            elif len(self._data) < end:
                break
            elif (message := _object_of(self._data[_LENGTH.size : end])) is None:
                self.is_garbled = True
            else:
                messages.append(message)
                del self._data[:end]
        return messages


def _object_of(body: bytes | bytearray) -> Message | None:
    """The JSON object that a message is, or None where it is nothing of the kind."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
