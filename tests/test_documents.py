"""What the documents say exists: the test command, links, verbs and names."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import onekernel
from onekernel.cli import VERBS

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
TEST_COMMAND = 'pip install -e ".[test]" && pytest'


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    extraction = re.search(r"^command=\$\((.*)\)$", script, re.MULTILINE)
    assert extraction is not None
    found = subprocess.run(["bash", "-c", extraction[1]], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == TEST_COMMAND
    assert 'bash -euo pipefail -c "$command"' in script


def test_contributing_gives_the_same_test_command() -> None:
    assert f"```bash\n{TEST_COMMAND}\n```" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_files_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_the_readme_names_every_verb_and_every_part() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    layout = readme.split("## Layout")[1]
    assert ", ".join(VERBS) in layout
    for path in (ROOT / "onekernel").iterdir():
        if not path.name.startswith(("_", ".")) and path.name != "py.typed":
            assert f"\n  {path.name}{'/' if path.is_dir() else ''} " in layout, path.name


def test_the_python_of_the_readme_is_python() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL):
        compile(block, "README.md", "exec")
        for name in re.findall(r"onekernel\.(\w+)", block):
            assert name in onekernel.__all__
