"""README and the other pages: what they link to is there, and they name every script and option."""

import re

import pytest
from conftest import ROOT, run

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in (ROOT, ROOT / "docs", ROOT / "results", ROOT / "results" / "remote")
    for path in folder.glob("*.md")
)
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:href|src)="([^"]+)"', text)
    inside = [link.split("#")[0] for link in links if not link.startswith(("http", "#"))]
    missing = [link for link in inside if not ((ROOT / page).parent / link).exists()]
    assert not missing


def test_readme_opens_with_a_warning_and_shows_every_script():
    assert README.splitlines()[2].startswith("> **Content warning.**")
    gallery = README[README.index("### Gallery") : README.index("## Your own concept")]
    for path in sorted((ROOT / "experiments").glob("*.py")):
        assert f"experiments/{path.name}" in README, path.name
        assert path.name in gallery or f'experiments/{path.name}"><img' in gallery, path.name


def test_commands_in_readme_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.M)) <= set(targets)
    for script in set(re.findall(r"(?:experiments|results|tests/bench)/\w+\.py", README)):
        assert (ROOT / script).is_file(), script


def test_options_in_readme_exist():
    """Every long option that README names belongs to a script, to the trainer, to torchrun or to pip."""
    known = {"--nproc-per-node", "--index-url", "--no-deps", "--help"}
    for command in ["-m dpo", "-m report", *(f"experiments/{p.name}" for p in (ROOT / "experiments").glob("*.py"))]:
        known |= set(re.findall(r"--[a-z0-9-]+", run(*command.split(), "--help", cwd=ROOT).stdout))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", README))
    assert named <= known, named - known
