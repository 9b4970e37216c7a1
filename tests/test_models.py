"""Names of models and folders as people type them."""

import pytest

from lib.models import resolve, short_name


@pytest.mark.parametrize("typed", [".", "./", "../{name}", "../{name}/", "./../{name}/.", "{path}", "{path}/", "link"])
def test_a_folder_is_named_by_what_it_is(tiny, tmp_path, monkeypatch, typed):
    folder = tiny("llama")
    monkeypatch.chdir(folder)
    link = tmp_path / "link"
    link.symlink_to(folder)
    given = str(link) if typed == "link" else typed.format(name=folder.name, path=folder)
    assert short_name(given) == folder.name
    assert resolve(given).path == str(folder.resolve()) and resolve(given).revision == resolve(str(folder)).revision
