"""The README as its reader meets it: its Python examples run, its two commands and links are there.

Separate because the README is code too: .ci/run executes its test command.
"""

import pathlib
import re
import subprocess
import sys

import pytest

_README = pathlib.Path(__file__).parents[1] / "README.md"
_EXAMPLES = re.findall(r"```python\n(.*?)```", _README.read_text(), re.DOTALL)


def test_has_examples():
    assert _EXAMPLES


@pytest.mark.parametrize("example", _EXAMPLES, ids=lambda text: text.splitlines()[0][:40])
def test_example_runs(example, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("marker", ["main job", "tests"])
def test_marked_command_is_one_line_that_makes_its_own_environment(marker):
    (block,) = re.findall(rf"<!-- {marker} -->\n```\w*\n(.*?)```", _README.read_text(), re.DOTALL)
    (command,) = block.splitlines()
    assert command.startswith("python3 -m venv ")


def test_links_to_files_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", _README.read_text())
    assert links
    for link in links:
        assert (_README.parent / link).exists(), link
