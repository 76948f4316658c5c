"""README and the pages in docs: valid commands, links to existing files and headings, complete tables."""

import re
import shlex
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from univitar_ds.cli.main import build_parser, parse
from univitar_ds.config.load import load_config

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES += [ROOT / folder / "README.md" for folder in ("slurm", "kernels", "ds_configs")]
OURS = re.compile(
    r"^(?:[A-Z_]+=\S+ )*(?:(?:\.venv/bin/)?univitar-ds|deepspeed .*--module univitar_ds|torchrun .*-m univitar_ds) "
)
ELSEWHERE = ("my.yaml", "run.yaml", "hub-model")
"""Run files and names that a reader puts in place of their own."""
MAX_README_LINES = 150
NEEDS = {
    "a GPU": r"--num_gpus|--nproc-per-node",
    "a cluster": r"\b(sbatch|enroot)\b|^--container-",
    "a bucket": r"s3://",
    "Docker": r"^docker ",
    "the network": r"^hf download |facebook/|hub-model|^python3\.11 -m venv |^pip install ",
    "hours of CPU time": r"^python benchmarks/bench_recipe\.py ",
}
"""What some commands need that no test has, with a pattern of these commands: they are checked here and not run."""
PROGRAM = re.compile(r"^(?:[A-Z_]+=\S+ )*(?:sbatch|srun|docker|enroot|hf|python|pip|make|--container-)")
OF_PROJECT = re.compile(r"(?<![\w./~$])(?:slurm|examples|kernels|ds_configs|benchmarks|tests|univitar_ds)/[\w./-]*")
"""A path in one of the project's folders."""


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def block_lines(page: Path) -> list[str]:
    """The lines of the blocks of a page that may hold commands."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)
    blocks = [block for language, block in fenced if language in ("", "sh", "bash")]
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def commands(page: Path) -> list[str]:
    """The commands of this program in the blocks of a page."""
    return [line for line in block_lines(page) if OURS.match(line)]


COMMANDS = [(page, line) for page in PAGES for line in commands(page)]


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_pages_have_commands_to_check():
    assert len(COMMANDS) > 40
    assert len({page for page, _ in COMMANDS}) > 6


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=lambda value: value.name if isinstance(value, Path) else value)
def test_a_command_is_one_that_the_parser_and_the_run_file_accept(page, line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(re.sub(r" > \S+", "", OURS.sub("", line)), comments=True)
    arguments = parse(build_parser(), words)
    config = getattr(arguments, "config", None)
    if config is not None and str(config) not in ELSEWHERE:
        load_config(config, list(getattr(arguments, "overrides", [])))


def test_paths_of_the_project_in_blocks_exist():
    named = [(page.name, path) for page in PAGES for line in block_lines(page) for path in OF_PROJECT.findall(line)]
    assert {path for _, path in named} >= {"slurm/train.sbatch", "examples/plugins/read_list.py"}
    assert [(page, path) for page, path in named if not (ROOT / path).exists()] == []


def test_commands_of_other_programs_are_targets_of_make_or_listed_with_what_they_need():
    targets = re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE)
    lines = [line for page in PAGES for line in block_lines(page)]
    others = [line for line in lines if PROGRAM.match(line) and not OURS.match(line)]
    here = [line for line in others if line.startswith("make ") and line.split()[1] in targets]
    assert here
    listed = [line for line in others if any(re.search(pattern, line) for pattern in NEEDS.values())]
    assert [line for line in others if line not in here + listed] == []
    unused = [need for need, pattern in NEEDS.items() if not any(re.search(pattern, line) for line in lines)]
    assert unused == [], "no command needs it"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", text_of(page)):
        if "://" in target:
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(path), f"{path.name} has no heading {anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_have_equally_many_cells_in_each_row(page):
    prose = re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    for table in re.findall(r"(?:^\|.*\n)+", prose, re.MULTILINE):
        rows = [re.sub(r"`[^`]*`", "", row).strip() for row in table.splitlines()]
        assert all(row.endswith("|") for row in rows), table
        assert len({row.count("|") for row in rows}) == 1, table


def test_every_page_is_reached_from_the_readme_which_is_short():
    readme = text_of(ROOT / "README.md")
    assert [page.name for page in ROOT.glob("docs/*.md") if f"(docs/{page.name})" not in readme] == []
    assert len(readme.splitlines()) <= MAX_README_LINES


def test_the_readme_says_what_the_batch_size_follows_from():
    rows = [line for line in text_of(ROOT / "README.md").splitlines() if line.startswith("| pa")]
    assert all(any(name in row for row in rows) for name in ("`stages.N.token_budget`", "`data.lanes`", "GradCache"))
