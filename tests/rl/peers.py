"""The published functions of verl, SkyRL, TRL and slime, out of packages without dependencies.

tools/install.sh puts the first three into .venv/side/rl. slime has no package on the registry: a
checkout of its version 0.3.1 may lie in .venv/side/slime. A module is loaded from its own file, its
parent packages empty, since these import Ray and much else.
"""

import ast
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

SIDE = Path(sys.prefix) / "side"
FOLDERS = {"verl": SIDE / "rl", "skyrl": SIDE / "rl", "trl": SIDE / "rl", "slime": SIDE / "slime"}
MODULES = {
    "verl": "verl.utils.megatron.tensor_parallel",
    "skyrl": "skyrl.backends.skyrl_train.distributed.megatron.model_utils",
    "trl": "trl.trainer.utils",
    "slime": "slime.utils.ppo_utils",
}
VERL_ENGINE = "verl.workers.engine.megatron.transformer_impl"


def require(stack: str) -> None:
    """Skip the test, by a sentence, where a stack is not there; fail on CI if it could be."""
    folder = FOLDERS[stack] / stack
    if folder.exists():
        return
    if stack == "slime":
        pytest.skip(f"slime has no package on the registry, and no checkout of it is in {folder}")
    missing = f"{folder} is missing: tools/install.sh puts the published {stack} there"
    if os.environ.get("INFOENTROPY_REQUIRE_EXT") == "1":
        pytest.fail(missing)
    pytest.skip(missing)


def published(stack: str) -> ModuleType:
    """The module of a stack that holds its functions."""
    if str(FOLDERS[stack]) not in sys.path:
        sys.path.append(str(FOLDERS[stack]))
    if stack != "trl":  # whose own needs are there
        for parent in _parents(MODULES[stack]):
            _empty_package(parent, FOLDERS[stack])
    return importlib.import_module(MODULES[stack])


def verls_engine() -> ModuleType:
    """A module in the place of verl's engine with the one published method that is tested.

    The rest of that module needs Ray, tensordict and Hydra.
    """
    functions = published("verl")
    path = FOLDERS["verl"].joinpath(*VERL_ENGINE.split(".")).with_suffix(".py")
    (method,) = (
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name == "_lm_head_logits_processor"
    )
    for argument in (*method.args.args, *method.args.kwonlyargs):
        argument.annotation = None
    module = ModuleType(VERL_ENGINE)
    names = vars(module)
    names["torch"] = functions.torch
    names |= {name: value for name, value in vars(functions).items() if name.startswith("vocab_")}
    exec(compile(ast.Module([method], []), str(path), "exec"), names)
    processor = names.pop(method.name)
    module.MegatronEngineWithLMHead = type("MegatronEngineWithLMHead", (), {method.name: processor})
    for parent in _parents(VERL_ENGINE):
        _empty_package(parent, FOLDERS["verl"])
    sys.modules[VERL_ENGINE] = module
    return module


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _empty_package(name: str, folder: Path) -> None:
    if name in sys.modules:
        return
    package = ModuleType(name)
    package.__path__ = [str(folder.joinpath(*name.split(".")))]
    sys.modules[name] = package
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, package)
