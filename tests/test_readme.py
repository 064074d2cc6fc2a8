"""The README's code runs, its generated parts are what the result files say, its files exist."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(code.splitlines()) <= 10
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["logits"].grad.isfinite().all()
    assert scope["loss"].item() > 5


def test_the_drop_in_lines_are_those_of_the_example_that_runs():
    (code,) = re.findall(r"```py\n(.*?)```", README, flags=re.S)
    example = (ROOT / "examples" / "drop_in.py").read_text()
    statements = [line.partition("  #")[0].strip() for line in code.splitlines()]
    for statement in filter(None, statements):
        assert statement in example, statement


def test_generated_parts_are_what_the_result_files_say():
    spec = importlib.util.spec_from_file_location("status", ROOT / "tools" / "status.py")
    status = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(status)
    for page, text in status.generated().items():
        assert page.read_text(encoding="utf-8") == text, "run `make pages`"


def test_it_is_short_and_begins_with_what_a_newcomer_wants():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert "pip install ." in "".join(lines[:40])


def test_linked_files_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
    for target in re.findall(r'src="([^":]+)"', README):
        assert (ROOT / target).exists(), target


def test_the_commands_it_shows_are_make_targets():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)`?", README):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
