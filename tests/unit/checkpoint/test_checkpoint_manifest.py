import hashlib
import json

import pytest

from megatron_rl.checkpoint.manifest import MANIFEST, fault_of, looks_complete, write_manifest
from megatron_rl.checkpoint.names import iteration_of, name_of

FILES = {
    "state.json": b"{}",
    "policy/.metadata": b"index",
    "policy/__0_0.distcp": b"tensors",
    "rank_0.pt": b"random",
}
ALL = slice(None)


def make(directory, iteration=4, files=FILES, *, name=None):
    """A checkpoint without a model in it."""
    path = directory / (name or name_of(iteration))
    listed = {}
    for file, content in files.items():
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_bytes(content)
        listed[file] = (len(content), hashlib.sha256(content).hexdigest())
    write_manifest(path, iteration, 1, listed)
    return path


def change(path, edit):
    content = json.loads((path / MANIFEST).read_text())
    edited = edit(content)
    (path / MANIFEST).write_text(json.dumps(content if edited is None else edited))


def test_a_checkpoint_as_it_was_written_has_no_fault(tmp_path):
    path = make(tmp_path)
    assert fault_of(path, ALL) is None
    assert looks_complete(path)


CHANGED = f"{MANIFEST} was changed after it was written"
DAMAGES = {
    "a list": (lambda content: [], f"no readable {MANIFEST}"),
    "nothing": (lambda content: "null", f"no readable {MANIFEST}"),
    "files as a list": (lambda content: {**content, "files": [1, 2]}, f"no readable {MANIFEST}"),
    "a size as text": (
        lambda content: content["files"].update({"state.json": ["2", "x"]}),
        f"no readable {MANIFEST}",
    ),
    "an entry as text": (
        lambda content: content["files"].update({"state.json": "x"}),
        f"no readable {MANIFEST}",
    ),
    "no files": (lambda content: content["files"].clear(), CHANGED),
    "a line left out": (lambda content: content["files"].popitem() and None, CHANGED),
    "another iteration": (lambda content: content.update(iteration=99), CHANGED),
    "no checksum": (lambda content: content.pop("checksum") and None, CHANGED),
    "another format": (lambda content: content.update(format=9), "format 9 is not 3"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_is_a_reason_and_no_crash(tmp_path, damage):
    edit, reason = DAMAGES[damage]
    path = make(tmp_path)
    change(path, edit)
    assert fault_of(path, ALL) == reason
    assert not looks_complete(path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"{"])
def test_a_manifest_that_is_no_json(tmp_path, content):
    path = make(tmp_path)
    (path / MANIFEST).write_bytes(content)
    assert fault_of(path, ALL) == f"no readable {MANIFEST}"


def test_what_stands_in_the_place_of_a_checkpoint(tmp_path):
    (tmp_path / "iteration_000001").mkdir()
    (tmp_path / "iteration_000002").write_text("")
    (tmp_path / "iteration_000003").symlink_to(tmp_path / "nowhere")
    for path in tmp_path.iterdir():
        assert fault_of(path, ALL) == f"no readable {MANIFEST}"
        assert not looks_complete(path)


def test_the_name_belongs_to_the_content(tmp_path):
    path = make(tmp_path, iteration=4, name="iteration_000009")
    assert "is of iteration 4, which the directory's name denies" in fault_of(path, ALL)


@pytest.mark.parametrize("missing", ["state.json", "policy/.metadata", "rank_0.pt"])
def test_a_list_too_short_for_a_checkpoint(tmp_path, missing):
    files = {name: content for name, content in FILES.items() if name != missing}
    assert fault_of(make(tmp_path, files=files), ALL) == f"{MANIFEST} does not list {missing}"


def test_checkpoints_from_before_the_checksum_are_read(tmp_path):
    path = make(tmp_path)
    change(path, lambda content: {**content, "format": 2, "checksum": None})
    content = json.loads((path / MANIFEST).read_text())
    del content["checksum"], content["world_size"]
    (path / MANIFEST).write_text(json.dumps(content))
    assert fault_of(path, ALL) is None


def test_a_changed_file_is_found_by_the_rank_whose_share_it_is(tmp_path):
    path = make(tmp_path)
    (path / "rank_0.pt").write_bytes(b"RANDOM")
    shares = [slice(rank, None, 2) for rank in range(2)]
    found = [fault_of(path, share) for share in shares]
    assert sorted(map(str, found)) == ["None", "rank_0.pt was changed after it was written"]
    assert looks_complete(path)  # it reads no contents


def test_iterations_are_compared_as_numbers(tmp_path):
    names = ["iteration_999999", "iteration_1000000", "iteration_000012"]
    numbers = [iteration_of(tmp_path / name) for name in names]
    assert numbers == [999999, 1000000, 12]
    assert iteration_of(tmp_path / ".iteration_000012.abc") == -1
