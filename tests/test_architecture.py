"""The rooms and who may import whom; sizes of files; what importing the package must not do."""

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "megatron_infoentropy"

# room -> rooms it may import, besides itself. Only these arrows exist.
MAY_IMPORT = {
    "config": set(),
    "console": set(),
    "progress": {"console"},
    "kernels": {"config"},
    "loss": {"config", "kernels"},
    "rl": {"config", "loss"},
    "runtime": set(),
    "files": set(),
    "checkpoints": {"files"},
    "integration": {"checkpoints", "config", "loss", "runtime"},
    "pretrain": {"integration", "runtime"},
    "data": {"files", "progress", "runtime"},
    # Its proof runs Megatron's own model, as the trainer builds it.
    "convert": {"checkpoints", "config", "data", "files", "integration", "progress", "runtime"},
    "evaluate": {"config", "data", "files", "kernels", "loss", "progress", "tasks"},
    "launch": {
        "checkpoints",
        "config",
        "data",
        "evaluate",
        "files",
        "pretrain",
        "progress",
        "runtime",
    },
    "study": {"config", "convert", "data", "evaluate", "files", "launch", "runtime", "tasks"},
    "tasks": {"files", "progress"},
    "bench": {
        *("config", "files", "integration", "kernels", "launch", "loss", "pretrain", "progress"),
        "runtime",
    },
    "doctor": {"data", "files", "kernels", "launch", "runtime"},
    "commands": {
        "bench",
        "checkpoints",
        "console",
        "convert",
        "data",
        "doctor",
        "evaluate",
        "launch",
        "study",
        "tasks",
    },
    "cli": {"commands", "console", "runtime"},
    "__main__": {"cli", "runtime"},
}
PUBLIC = {"InfoEntropyConfig": "config"}  # names of the package itself belong to these rooms

# third-party package -> the only rooms that may import it
OWNERS = {
    "megatron": {"integration", "pretrain", "bench", "launch", "convert", "rl"},
    "transformers": {"convert", "data", "evaluate"},  # data: ids are those it gives
    "safetensors": {"convert"},
    "tokenizers": {"data", "convert", "evaluate"},
    "zstandard": {"data"},
    "datatrove": {"data"},
    "fsspec": {"data"},
    "pyarrow": {"data"},
    "matplotlib": {"evaluate"},
    "jinja2": {"evaluate"},
    "lm_eval": {"tasks"},
    "yaml": {"launch", "convert", "study", "tasks"},
    "typer": {"cli", "commands"},
    "rich": {"console", "commands", "progress", "bench"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}
NODES = [(path, node) for path, tree in TREES.items() for node in ast.walk(tree)]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[tuple[str, str]]:
    """(top-level package, room of ours or '') of every import, also those inside functions."""
    found = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            room = rest.split(".")[0] if top == PACKAGE.name else ""
            found.add((top, PUBLIC.get(room, room)))
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_what_it_may(path):
    room = room_of(path)
    if room in ("__init__", "_C"):
        return
    assert room in MAY_IMPORT, f"a new room {room!r} needs its arrows in MAY_IMPORT"
    for top, target in imports_of(path):
        if top == PACKAGE.name and target in MAY_IMPORT:
            allowed = MAY_IMPORT[room] | {room}
            assert target in allowed, f"{room} -> {target} is not an arrow of the house"
        elif top == PACKAGE.name:
            public = {"__version__", "_C", "infoentropy_loss", "vocab_parallel_statistics"}
            assert target in public, f"{path.name} imports {target!r}"
        elif top in OWNERS:
            assert room in OWNERS[top], f"{top} belongs to {OWNERS[top]}, not to {room}"


def test_the_compiled_extension_has_one_reader_a_device():
    readers = {p.name for p in MODULES if (PACKAGE.name, "_C") in imports_of(p)}
    assert readers == {"native.py", "cuda.py"}


def test_no_file_is_too_long():
    tracked = subprocess.run(
        ["git", "ls-files", "*.py", "*.cpp", "*.h", "*.inl", "*.sh"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in tracked}
    assert {name: n for name, n in lengths.items() if n > 450} == {}


# Walls that are small and have one importer: Python's and the command's way in, an import that not
# every version of Megatron has.
WALLS = {"__main__.py", "cli.py", "integration/hybrid.py"}


def importers() -> dict[str, set[str]]:
    """Modules that import each module, both by their paths in the package."""
    importers_of: dict[str, set[str]] = {str(path.relative_to(PACKAGE)): set() for path in MODULES}
    for path, node in NODES:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE.name):
            folder = node.module.removeprefix(PACKAGE.name).strip(".").replace(".", "/")
            names = {f"{folder}/{alias.name}.py".strip("/") for alias in node.names}
            for name in names | {f"{folder}.py"}:
                importers_of.get(name, set()).add(str(path.relative_to(PACKAGE)))
    return importers_of


def test_a_module_earns_its_place():
    """It has two importers, or more than 120 lines, or is a wall on purpose."""
    lengths = {name: len((PACKAGE / name).read_text().splitlines()) for name in importers()}
    small = {name for name, found in importers().items() if len(found) < 2 and lengths[name] <= 120}
    assert {name for name in small if not name.endswith("__init__.py")} == WALLS


def test_a_name_says_which_one_is_meant():
    """No class is called as another, nor are files of three rooms."""
    files, classes = defaultdict(set), defaultdict(set)
    for path, tree in TREES.items():
        files[path.name].add(path.parent)
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                classes[node.name].add(path)
    assert {n for n, rooms in files.items() if len(rooms) > 2} == {"__init__.py"}
    assert {n for n, modules in classes.items() if len(modules) > 1} == set()


def test_nothing_that_is_printed_is_read_as_markup():
    """Names of files and domains are printed as they are: consoles are made in console.py."""
    for path, node in NODES:
        if isinstance(node, ast.ImportFrom) and node.module in {"rich", "rich.markup"}:
            assert {alias.name for alias in node.names} <= {"box"}, path
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func).rpartition(".")[2]
        options = {option.arg: ast.unparse(option.value) for option in node.keywords}
        assert name != "Console" or path.name == "console.py", f"{path}:{node.lineno}"
        assert name != "from_markup", f"{path}:{node.lineno}"
        assert options.get("markup", "False") == "False", f"{path}:{node.lineno}"
        assert name != "TextColumn" or "markup" in options, f"{path}:{node.lineno}"


def is_word(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def encodings_left_to_the_locale(source: str) -> list[int]:
    """Lines that open a text file without `encoding`, or a pipe of text without `errors`."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func).rpartition(".")[2]
        said = {keyword.arg for keyword in node.keywords}
        modes = [*node.args[:2], *(key.value for key in node.keywords if key.arg == "mode")]
        words = [part.value for mode in modes for part in ast.walk(mode) if is_word(part)]
        is_binary = any("b" in word and set(word) <= set("rwaxb+") for word in words)
        if name in {"read_text", "write_text", "TextIOWrapper"}:
            wrong = "encoding" not in said
        elif name in {"open", "fdopen", "TemporaryFile", "NamedTemporaryFile"}:
            wrong = not is_binary and "encoding" not in said
            wrong &= ast.unparse(node.func) not in {"os.open", "webbrowser.open"}
        else:
            wrong = "text" in said and not said & {"encoding", "errors"}
            wrong &= name in {"run", "Popen", "check_output"}
        if wrong:
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("folder", ["megatron_infoentropy", "tools", "examples", "setup.py"])
def test_no_text_depends_on_the_locale(folder):
    """Text files are UTF-8 wherever they are read, and no pipe dies of a byte that is not."""
    paths = [ROOT / folder, *(ROOT / folder).rglob("*.py")]
    wrong = {
        str(path.relative_to(ROOT)): lines
        for path in paths
        if path.is_file()
        and (lines := encodings_left_to_the_locale(path.read_text(encoding="utf-8")))
    }
    assert wrong == {}


def test_a_text_file_without_an_encoding_is_seen():
    seen = ("path.read_text()", "Path('x').write_text(words)", "path.open('w', newline='')")
    seen += ("open(name)", "TemporaryFile('w+')", "subprocess.run(command, text=True)")
    fine = ("path.open('rb')", "path.open('r+b' if there else 'w+b')", "open(name, mode='wb')")
    fine += ("os.open(path, os.O_RDONLY)", "path.read_text(encoding='utf-8')")
    fine += ("subprocess.run(command, text=True, errors='replace')", "subprocess.run(command)")
    assert [encodings_left_to_the_locale(call) for call in seen] == [[1]] * len(seen)
    assert not any(map(encodings_left_to_the_locale, fine))


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import megatron_infoentropy",
        "from megatron_infoentropy import InfoEntropyConfig",
        "import megatron_infoentropy.cli",
        "import megatron_infoentropy.data.preprocess",
        "import megatron_infoentropy.evaluate.runlog",
    ],
)
def test_light_imports_stay_light(statement):
    heavy = {"torch", "transformers", "megatron", "matplotlib"}
    assert not heavy & modules_after(statement)


def test_the_public_names_are_there_and_no_others_are_promised():
    import megatron_infoentropy

    for name in megatron_infoentropy.__all__:
        assert getattr(megatron_infoentropy, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'loss_function'"):
        _ = megatron_infoentropy.loss_function


def megatron_symbols():
    """Lines "| `module` | `name`, ... |" of all that the package imports of Megatron."""
    names = defaultdict(set)
    for path, node in NODES:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron."):
            names[node.module].update(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("megatron.") for alias in node.names), path
    return [
        f"| `{module}` | {', '.join(f'`{name}`' for name in sorted(found))} |"
        for module, found in sorted(names.items())
    ]


def test_the_docs_list_every_symbol_that_is_imported_from_megatron():
    page = (ROOT / "docs" / "drop-in.md").read_text(encoding="utf-8")
    expected = megatron_symbols()
    assert len(expected) > 20
    listed = [line for line in page.splitlines() if line.startswith("| `megatron.")]
    assert listed == expected, "docs/drop-in.md should have:\n" + "\n".join(expected)
