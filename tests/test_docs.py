"""The documents: what they name exists, their examples run, and the README stays short."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from datasets import DATA_SETS
from training.options import parse_args

REPOSITORY = Path(__file__).resolve().parent.parent
NAMED = re.findall(r"`(tests/[\w/]+\.py[\w:]*)`", (REPOSITORY / "docs/reliability.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMED)
def test_every_test_that_a_promise_names_exists(name):
    path, *inner = name.split("::")
    assert (REPOSITORY / path).is_file(), path
    node = ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))
    for part in inner:
        node = next((n for n in node.body if getattr(n, "name", None) == part), None)
        assert node is not None, name
    if inner:
        assert inner[-1].startswith("test_")


def test_every_promise_names_a_test():
    lines = (REPOSITORY / "docs/reliability.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith(("| promise", "| ---"))]
    assert len(rows) > 20 and all("`tests/" in row.rsplit("|", 2)[1] for row in rows)


PAGES = {
    str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8")
    for path in (REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md")))
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def examples(page: str, language: str) -> list[str]:
    return [code for name, code in FENCE.findall(PAGES[page]) if name == language]


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_readme_is_short_and_the_index_has_every_page():
    assert len(PAGES["README.md"].splitlines()) <= 200
    pages = {Path(name).name for name in PAGES if name.startswith("docs/")} - {"index.md"}
    assert pages == {link for link in re.findall(r"\]\((\w+\.md)\)", PAGES["docs/index.md"])}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    prose = FENCE.sub("", PAGES[page])
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith("http"):
            continue
        path, _, heading = target.partition("#")
        file = (REPOSITORY / page).parent / path if path else REPOSITORY / page
        assert file.exists(), f"{page} links to {target}"
        if heading:
            found = [anchor(line.lstrip("# ")) for line in file.read_text("utf-8").splitlines() if line.startswith("#")]
            assert heading in found, f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_an_example_or_marked_as_text(page):
    assert {name for name, _ in FENCE.findall(PAGES[page])} <= {"python", "bash", "diff", "text", "bibtex"}


@pytest.mark.parametrize("page", [name for name in PAGES if name != "docs/extending.md" and examples(name, "python")])
def test_python_examples_run(page, capsys):
    """In one namespace per page, as a reader would type them."""
    namespace: dict[str, object] = {}
    for code in examples(page, "python"):
        exec(compile(code, page, "exec"), namespace)
    assert "linears quantized" in capsys.readouterr().out


COMMANDS = ("bash", "source", "python", "pytest", "pip", "torchrun", "sbatch")


@pytest.mark.parametrize("page", [name for name in PAGES if examples(name, "bash")])
def test_commands_are_ones_that_the_program_takes(page, monkeypatch):
    """Files exist, and main.py's parser accepts the options; what trains is run elsewhere."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "4")
    for line in "".join(examples(page, "bash")).splitlines():
        words = [word for word in shlex.split(line, comments=True) if word != "..."]
        words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
        if not words:
            continue
        assert words[0] in COMMANDS, f"{page}: {line}"
        files = [word for word in words if re.fullmatch(r"[\w/]+\.(sh|py)|tests/[\w/]*", word)]
        assert all((REPOSITORY / file).exists() for file in files), f"{page}: {line}"
        if "main.py" in words or "scripts/slurm.sh" in words:
            parse_args(words[words.index(files[0]) + 1 :])


def test_every_data_set_has_its_row():
    rows = [line.split(" | ")[0] for line in PAGES["docs/data.md"].splitlines() if re.match(r"\| `[A-Z]", line)]
    named = re.findall(r"`(\w+)`", " ".join(rows))
    assert sorted(named) == sorted(DATA_SETS)


def tree() -> tuple[set[Path], set[Path]]:
    """The files and the folders of docs/architecture.md, by the indentation of its lines."""
    files, folders, room = set(), set(), Path()
    for line in examples("docs/architecture.md", "text")[0].splitlines():
        room = room if line.startswith(" ") else Path()
        # What follows two spaces is a description, in which "; NAME.py" and ", NAME.py" are entries, too.
        entries = re.findall(r"(?:^\s*|, |; )([a-z_]+(?:\.py|/))", line)
        files |= {room / entry for entry in entries if entry.endswith(".py")}
        folders |= {room / entry for entry in entries if entry.endswith("/")}
        if not line.startswith(" ") and entries and entries[0].endswith("/"):
            room = Path(entries[0])
    return files, folders


def test_the_tree_has_every_module_and_nothing_else():
    """A module is in it by its name, or by its folder if the tree does not look into that folder."""
    files, folders = tree()
    assert not [file for file in files if not (REPOSITORY / file).is_file()]
    assert not [folder for folder in folders if not (REPOSITORY / folder).is_dir()]
    looked_into = {file.parent for file in files}
    assert {Path(), Path("training"), Path("data"), Path("quantization")} == looked_into
    ignored = {"tests", ".venv"}
    for path in REPOSITORY.rglob("*.py"):
        module = path.relative_to(REPOSITORY)
        if module.parts[0] in ignored or module.parts[0].startswith(".") or module.name == "__init__.py":
            continue
        in_a_folder = any(parent in folders and parent not in looked_into for parent in module.parents)
        assert module in files or in_a_folder, f"docs/architecture.md lacks {module}"


@pytest.mark.parametrize("page", PAGES)
def test_prose_reads_at_first_sight(page):
    """No sentence begins with "Of", no commit hash stands in the text, and lines fit a screen."""
    prose = FENCE.sub("", PAGES[page])
    assert not re.search(r"(^|[.:]\s)Of ", prose, re.MULTILINE)
    hashes = [
        word for word in re.findall(r"\b[0-9a-f]{7,40}\b", prose) if re.search("[a-f]", word) and re.search(r"\d", word)
    ]
    assert not hashes
    assert all(len(line) <= 120 for line in prose.splitlines() if not line.startswith("|"))
