import json

import yaml

from megatron_rl.metrics.starts import write_start


def test_each_start_adds_its_files_and_the_newest_are_copied_up(tmp_path):
    for number, seed in enumerate((7, 8, 9)):
        start = write_start(tmp_path / "run", {"run": {"seed": seed}}, {"world_size": seed})
        assert start == tmp_path / "run" / "starts" / f"{number:03d}"
    for number, seed in enumerate((7, 8, 9)):
        start = tmp_path / "run" / "starts" / f"{number:03d}"
        assert yaml.safe_load((start / "config.yaml").read_text()) == {"run": {"seed": seed}}
        assert json.loads((start / "environment.json").read_text()) == {"world_size": seed}
    for name in ("config.yaml", "environment.json"):
        newest = tmp_path / "run" / "starts" / "002" / name
        assert (tmp_path / "run" / name).read_bytes() == newest.read_bytes()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.yaml",
        "environment.json",
        "starts",
    }


def test_what_an_older_version_wrote_is_kept_as_the_first_start(tmp_path):
    (tmp_path / "config.yaml").write_text("old")
    (tmp_path / "environment.json").write_text("{}")
    assert write_start(tmp_path, {}, {}).name == "001"
    assert (tmp_path / "starts" / "000" / "config.yaml").read_text() == "old"
    assert (tmp_path / "starts" / "000" / "environment.json").read_text() == "{}"


def test_starts_are_numbered_beyond_a_thousand(tmp_path):
    for number in ("999", "1000"):
        (tmp_path / "starts" / number).mkdir(parents=True)
    assert write_start(tmp_path, {}, {}).name == "1001"
