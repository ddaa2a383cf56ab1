"""Files and folders that are whole or not there."""

from __future__ import annotations

import pytest

from slimfit_ds.training.whole_files import is_leftover, replaced_folder, write_whole


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_whole(path, "old")

    def cut(descriptor):
        assert path.read_text() == "old"
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", cut)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new and longer")
    assert path.read_text() == "old"
    assert [is_leftover(found) for found in sorted(tmp_path.iterdir())] == [True, False]


def test_a_folder_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    folder = tmp_path / "model"
    for text in ("old", "new"):
        with replaced_folder(folder, acts=True) as part:
            (part / "weights").write_text(text)
            if text == "new":
                assert (folder / "weights").read_text() == "old"
        assert (folder / "weights").read_text() == text

    def fail():
        with replaced_folder(folder, acts=True) as part:
            (part / "weights").write_text("broken")
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert (folder / "weights").read_text() == "new"
    with replaced_folder(folder, acts=True):
        pass
    assert [found.name for found in tmp_path.iterdir()] == ["model"], "what was left over is gone"


def test_the_other_ranks_only_learn_the_name(tmp_path):
    with replaced_folder(tmp_path / "model", acts=False) as part:
        assert part == tmp_path / ".model.part"
    assert list(tmp_path.iterdir()) == []
