"""What the documentation's site takes from the repository beside docs/: files and command lines.

Pages link to files of the repository as `../examples/tiny.yaml`, which works where the repository
is read. In the site those files lie below `repository/`.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.testing import CliRunner

from megatron_infoentropy.__main__ import EXTRA_OF
from megatron_infoentropy.cli import app

ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"(\]\()(?:\.\./)+((?:examples|tools|tests|megatron_infoentropy)/[^)#]*)")
_README = re.compile(r"\]\((?:\.\./)+README\.md[^)]*\)")
_COMMANDS = "<!-- commands -->"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the repository's files that a page links to."""
    for page in files.documentation_pages():
        for _, target in _LINK.findall(page.content_string):
            path = ROOT / target
            if path.is_file() and files.get_file_from_path(f"repository/{target}") is None:
                files.append(File.generated(config, f"repository/{target}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links at those files, and the README's at the home page; fill in the commands."""
    up = "../" * page.file.src_uri.count("/")
    markdown = _LINK.sub(rf"\g<1>{up}repository/\g<2>", markdown)
    markdown = _README.sub(f"]({up}index.md)", markdown)
    return markdown.replace(_COMMANDS, _help_texts()) if _COMMANDS in markdown else markdown


def _help_texts() -> str:
    parts = []
    for command in EXTRA_OF:
        done = CliRunner().invoke(
            app, [command, "--help"], prog_name="infoentropy", terminal_width=96
        )
        if done.exit_code != 0:
            raise RuntimeError(f"infoentropy {command} --help failed: {done.output}")
        parts.append(f"## {command}\n\n```text\n{done.output.strip()}\n```\n")
    return "\n".join(parts)
