"""Files of others: nothing waits, nothing has no end, and JSON means one thing."""

import os
import time

import pytest

from megatron_rl import files
from megatron_rl.errors import InputError
from megatron_rl.files import JsonError, open_regular, parse_json, read_json_object, read_text


@pytest.fixture
def fifo(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("read", [open_regular, read_text, read_json_object])
def test_a_fifo_is_refused_without_waiting_for_its_writer(fifo, read):
    started = time.monotonic()
    with pytest.raises(InputError, match="is a FIFO: must be a regular file"):
        read(fifo)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(("path", "kind"), [("/dev/zero", "a device"), ("/", "a directory")])
def test_what_has_no_end_or_no_text_is_refused(tmp_path, path, kind):
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(InputError, match=f"{link}: is {kind}"):
        read_text(link)


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_TEXT_BYTES", 3)
    path = tmp_path / "text"
    path.write_text("abc")
    assert read_text(path) == "abc"
    path.write_text("abcd")
    with pytest.raises(InputError, match="has 4 bytes: at most 3 are read"):
        read_text(path)


def test_what_is_opened_can_be_read_and_sought(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"abcdef")
    with open_regular(path) as file:
        assert (file.read(2), file.seek(4), file.read()) == (b"ab", 4, b"ef")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": 1, "b": 2, "a": 1}', "the key 'a' stands twice in one object"),
        ('[{"a": {"b": 1, "b": 2}}]', "the key 'b' stands twice in one object"),
        ("[" * 100_000, "not JSON that can be read: RecursionError"),
        ("9" * 10_000, "not JSON that can be read: ValueError"),
        ("{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        ('{\n"a" 1}', "not JSON: Expecting ':' delimiter at line 2, column 5"),
    ],
)
def test_a_text_that_is_no_clear_json_says_why(text, problem):
    with pytest.raises(JsonError) as caught:
        parse_json(text)
    assert str(caught.value) == problem


def test_one_key_in_two_objects_is_clear():
    assert parse_json('[{"a": 1}, {"a": 2}]') == [{"a": 1}, {"a": 2}]
