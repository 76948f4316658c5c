"""Files of a clone besides the code, and that the pages need nothing else."""

import hashlib
import re
import tomllib

from tests.support.paths import ROOT

APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
"""Of the text as the Apache Software Foundation publishes it."""


def test_the_license_has_the_whole_text_and_is_named_in_readme_and_metadata():
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (project["license"], project["license-files"]) == ("Apache-2.0", ["LICENSE"])
    assert "[Apache-2.0](LICENSE)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_changelog_has_a_section_for_unreleased_changes():
    heads = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert heads[0] == "Unreleased"


def test_no_command_of_the_pages_or_recipe_uses_a_path_outside_of_a_clone():
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL):
            assert language or "../" not in block, block
    for recipe in (ROOT / "univitar_ds" / "recipes").glob("*.yaml"):
        assert "../" not in recipe.read_text(encoding="utf-8"), recipe
