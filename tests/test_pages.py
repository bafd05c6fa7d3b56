"""README.md, the pages of docs/ and the site made of them: what a reader copies, links and figures.

mkdocs itself is not needed: `make docs` runs it, with --strict.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from docs import make_picture, site_hooks, train_options
from moe_upgrpo.train.command_line import parsed
from moe_upgrpo.train.config import OPTIONS, TrainConfig

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
MARKDOWN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
FENCES = re.compile(r"^( *)```.*?^\1```", re.DOTALL | re.MULTILINE)


def test_the_five_lines_of_the_readme_compare_two_dumps(tmp_path, monkeypatch, capsys):
    """Two layers of two tokens: one router of four has another set, in one of the two tokens."""
    monkeypatch.chdir(tmp_path)
    engine = np.array([[[0, 1], [2, 3]], [[4, 5], [6, 7]]])
    np.save("engine.npy", engine)
    np.save("trainer.npy", np.array([[[1, 0], [2, 9]], [[4, 5], [7, 6]]]))
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in block.splitlines() if line]) == 5
    exec(block, {})
    assert capsys.readouterr().out == "25.0% of routers and 50.0% of tokens differ\n"


def test_the_readme_fits_a_screen_and_a_half():
    assert len(README.split()) < 1100


def test_the_pages_stay_short():
    """Words of docs/*.md that are written by hand, code blocks aside."""
    generated = re.compile(r"<!-- begin (\S+) -->.*?<!-- end \1 -->", re.DOTALL)
    pages = [page.read_text(encoding="utf-8") for page in DOCS.glob("*.md")]
    words = sum(len(FENCES.sub("", generated.sub("", page)).split()) for page in pages)
    assert 20_000 < words <= 30_000, "cut elsewhere what you add"


def test_the_readmes_verdicts_are_those_of_the_page():
    """Verdict and every figure of a sentence stand in the rows of its claim in docs/verdicts.md."""
    rows, claim = {}, ""
    for line in (DOCS / "verdicts.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 5:
            claim = cells[0] or claim
            rows.setdefault(claim, []).append(line)
    section = re.search(
        r"<!-- begin three-verdicts -->\n(.*)\n<!-- end three-verdicts", README, re.DOTALL
    )[1]
    sentences = section.splitlines()
    assert len(sentences) == 3
    for sentence in sentences:
        claim, verdict, because = re.fullmatch(
            r"- \*(.+?)\*: \*\*(.+?)\*\*\. (.+)", sentence
        ).groups()
        (said,) = (text for name, text in rows.items() if name.startswith(claim))
        together = [line for line in said if "*together*" in line] or said
        assert f"**{verdict}**" in together[-1], claim
        figures = re.findall(r"[+−.]\d[\d.]*(?: ± [.\d]+| \([^)]+ to [^)]+\))", because)
        assert figures
        for figure in figures:
            assert figure.rstrip(".") in "\n".join(said), figure


def test_the_picture_is_of_the_kept_data():
    """Its numbers are in the file; the mismatch is that of published models."""
    kept = make_picture.numbers()
    text = (DOCS / "img/mismatch.svg").read_text(encoding="utf-8")
    assert json.dumps(kept) in text, "run python -m docs.make_picture"
    assert 10 < np.mean(kept["mismatch/router_rate"]) < 13
    assert make_picture.in_dark_mode() in text
    drawn = {color for color in re.findall(r": (#[0-9a-f]{6})\b", text)}
    both = {color.lower() for pair in make_picture.DARK.items() for color in pair}
    assert drawn == both, "a colour without its own in dark mode"
    for line in (*make_picture.SHARES.values(), *make_picture.ARMS.values()):
        assert line in text


def test_make_docs_installs_what_the_extra_names():
    extra = re.search(r'"docs": \[(.*)\]', (ROOT / "setup.py").read_text(encoding="utf-8"))[1]
    make = re.search(r"^DOCS_NEEDS = (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert re.findall(r'"(.+?)"', extra) == re.findall(r"'(.+?)'", make)


def test_every_page_is_in_the_sites_navigation_once():
    def pages(entries):
        for entry in entries:
            for place in entry.values():
                yield from pages(place) if isinstance(place, list) else [place]

    listed = [*pages(SITE["nav"])]
    assert sorted(listed) == [page.name for page in sorted(DOCS.glob("*.md"))]
    for name in (*SITE["extra_css"], *(Path(hook).name for hook in SITE["hooks"])):
        assert (DOCS / name).is_file()


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.name)
def test_every_link_has_its_target(page):
    text = FENCES.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        place, _, anchor = target.partition("#")
        if re.match(r"https?:", target):
            continue
        file = page.parent / place if place else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


def anchors(text: str) -> set[str]:
    """The ids that both GitHub and the site give to the headings."""
    headings = re.findall(r"^#+ (.+)$", FENCES.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_a_link_without_a_target_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One\n\n[a](#one)\n")
    test_every_link_has_its_target(page)
    for bad in ("[a](#two)", "[a](other.md)"):
        page.write_text(f"# One\n\n{bad}\n")
        with pytest.raises(AssertionError):
            test_every_link_has_its_target(page)


def test_a_reader_of_the_site_sees_what_is_generated():
    """And a link out of docs/ is a path, or goes to the repository where there is one."""
    page = "a\n\n<!-- begin x -->\n| a |\n<!-- end x -->\n[test](../tests/a.py)\n"
    made = site_hooks.on_page_markdown(page, config={"repo_url": None})
    assert '<p class="generated">Generated from the code' in made
    assert "\n\n| a |\n\n" in made and "test (`tests/a.py`)" in made
    made = site_hooks.on_page_markdown(page, config={"repo_url": "https://host/us/it/"})
    assert "[test](https://host/us/it/blob/main/tests/a.py)" in made


def test_the_page_of_options_has_every_option_by_its_name_on_the_command_line():
    page = train_options.markdown()
    named = re.findall(r"^\| `--([\w.-]+)` \|", page, re.MULTILINE)
    assert len(named) == len(set(named))
    assert {name.split(".")[0].replace("-", "_") for name in named} == set(OPTIONS)
    (line,) = (line for line in page.splitlines() if line.startswith("| `--policy.clip-low` |"))
    assert line.split(" | ")[1:3] == ["number", "the preset's"]
    words = ["--optimizer.lr", "2e-4", "--policy.clip-low", "0.1", "--tiny.top-k", "1"]
    assert {word[2:] for word in words[::2]} <= set(named)
    config = parsed(TrainConfig, words, "train")
    assert config.trainer.optimizer.lr == 2e-4 and config.start.tiny.top_k == 1


def test_contributing_names_files_and_names_that_there_are():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+/\w+\.py)(?:::(\w+))?`", text)
    assert len(named) > 20
    for place, name in named:
        files = [top / place for top in (ROOT, ROOT / "moe_upgrpo")]
        (file,) = (file for file in files if file.is_file())
        assert re.search(rf"\b{name}\b", file.read_text(encoding="utf-8")), (place, name)
