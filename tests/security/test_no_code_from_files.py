"""No call in the package can run what a file holds: the sources are walked."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_infoentropy"
MODULES = sorted(PACKAGE.rglob("*.py"))

# What runs code that data holds, or parses more than data.
REFUSED = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load", "torch.jit.load"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "marshal.load"),
    *("marshal.loads", "shelve.open", "joblib.load", "eval", "exec", "compile", "os.system"),
    *("os.popen", "__import__", "tarfile.open", "shutil.unpack_archive", "torch.hub.load"),
}
# What is read back from this package's own processes, the unpickler that runs nothing, and a class
# of transformers that is given tensors, not a folder.
OWN = {
    ("convert/hf_model.py", "family.from_pretrained without trust_remote_code=False"),
    ("data/tokenizer.py", "pickle.loads"),
    ("data/workers.py", "pickle.load"),
    ("data/executors.py", "pickle.load"),
    ("bench/run.py", "pickle.loads"),
    ("convert/unpickle.py", "pickle.Unpickler"),
}


def name_of(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    return f"{name_of(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((word.value for word in call.keywords if word.arg == name), None)


def is_value(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def dangers(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            found += [name_of(base) for base in node.bases if name_of(base) in REFUSED]
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node.func)
        if name == "torch.load" and is_value(keyword(node, "weights_only"), True):
            continue
        if name in REFUSED:
            found.append(name)
        if keyword(node, "allow_pickle") and not is_value(keyword(node, "allow_pickle"), False):
            found.append(f"{name}(allow_pickle=...)")
        trust = keyword(node, "trust_remote_code")
        if trust is not None and not is_value(trust, False):
            found.append(f"{name}(trust_remote_code=...)")
        if name.endswith("from_pretrained") and trust is None:
            found.append(f"{name} without trust_remote_code=False")
        if name.endswith("Environment") and not is_value(keyword(node, "autoescape"), True):
            found.append(f"{name} without autoescape=True")
        if is_value(keyword(node, "shell"), True):
            found.append(f"{name}(shell=True)")
        if name.rpartition(".")[2] in ("extract", "extractall"):
            found.append(name)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_loads_nothing_that_could_run(path):
    place = path.relative_to(PACKAGE).as_posix()
    found = [name for name in dangers(path.read_text()) if (place, name) not in OWN]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.loads(data)",
        "class Mine(pickle.Unpickler): pass",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "AutoModel.from_pretrained(path)",
        "AutoModel.from_pretrained(path, trust_remote_code=trusted)",
        "jinja2.Environment(loader=loader)",
        "subprocess.run(words, shell=True)",
        "archive.extractall(folder)",
    ],
)
def test_the_walk_sees_what_is_refused(source):
    assert dangers(source)


def test_nothing_is_imported_under_a_name_that_would_hide_it():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "yaml", "marshal"):
                raise AssertionError(f"{path}: from {node.module} import ...: import the module")
            if isinstance(node, ast.Import):
                hidden = [alias.name for alias in node.names if alias.asname]
                assert not {"pickle", "yaml", "marshal", "torch"} & set(hidden), path
