"""Recipes: sections of Megatron's flags, strictly read."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_infoentropy.launch import recipe as recipe_module
from megatron_infoentropy.launch.recipe import (
    FUSION_KERNEL,
    NO_FUSION_FLAG,
    LaunchSection,
    RecipeError,
    chosen_flags,
    load_plan,
    load_recipe,
    machine_flags,
    read_facts,
    to_command_line,
)
from megatron_infoentropy.runtime.device import Device

EXAMPLES = Path(__file__).parents[2] / "examples"


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_flags_of_all_sections_in_order(tmp_path):
    recipe = write(
        tmp_path,
        "model:\n  num-layers: 4\n  swiglu: true\n  bias: false\n  spec: null\n"
        "optimizer:\n  lr: 1.0e-3\n  betas: [0.9, 0.95]\n",
    )
    assert to_command_line(load_recipe(recipe)) == [
        *("--num-layers", "4", "--swiglu", "--lr", "0.001", "--betas", "0.9", "0.95"),
    ]


TEXTS = {
    "- a\n- b\n": "expected sections of flags, got list",
    "lr: 1\n": "section 'lr' must hold",
    "a:\n  lr: 1\nb:\n  lr: 2\n": "flag 'lr' is given twice",
    "a:\n  lr: 1\n  x: 3\n  lr: 2\n": "line 4: 'lr' is given twice",
    "a:\n  lr: 1\na:\n  x: 2\n": "line 3: 'a' is given twice",
    "a:\n  lr:\n    b: 1\n": "flag 'lr' has a section as its value",
    "a: [\n": "is not YAML",
    "a: !!python/object/apply:os.getcwd []\n": "is not YAML",
}


@pytest.mark.parametrize("text", TEXTS)
def test_anything_else_is_refused_in_words(tmp_path, text):
    with pytest.raises(RecipeError, match=TEXTS[text]):
        load_recipe(write(tmp_path, text))


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"no recipe at .*nowhere\.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_the_launch_section_is_not_megatrons(tmp_path):
    text = "a:\n  lr: 1\nlaunch:\n  ranks: 16\n  data-weights: paper\n"
    recipe = write(tmp_path, text)
    assert load_recipe(recipe) == {"lr": 1}
    assert load_plan(recipe) == LaunchSection(ranks=16, data_weights="paper")
    assert load_plan(write(tmp_path, "a:\n  lr: 1\n")) == LaunchSection(None, "natural")


LINES = {
    "world: 8": "no setting 'world', only ranks and data-weights",
    "ranks: many": "ranks must be of type int, got 'many'",
    "ranks: true": "ranks must be of type int, got True",
    "ranks: 0": "ranks must be at least 1, got 0",
    "data-weights: 3": "data-weights must be of type str, got 3",
}


@pytest.mark.parametrize("line", LINES)
def test_a_launch_section_is_read_strictly(tmp_path, line):
    with pytest.raises(RecipeError, match=LINES[line]):
        load_plan(write(tmp_path, f"launch:\n  {line}\n"))


RECIPES = sorted([*EXAMPLES.glob("*.yaml"), *EXAMPLES.glob("paper/*.yaml")])


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_every_example_is_a_recipe(path):
    assert read_facts(chosen_flags(Device("cpu", "gloo", 1), load_recipe(path), {}))["seq_length"]
    assert load_plan(path).data_weights in ("natural", "paper")


TE = "transformer_engine"


@pytest.mark.parametrize(
    ("installed", "flags", "asked"),
    [
        ((), {}, [*recipe_module.PLAIN_GPU_FLAGS, NO_FUSION_FLAG]),
        ((TE,), {}, [NO_FUSION_FLAG]),  # its layers, not the fusion of the output layer
        ((), {"transformer-impl": TE}, [NO_FUSION_FLAG]),
        ((TE, FUSION_KERNEL), {}, []),
    ],
)
def test_a_machine_asks_for_what_its_optional_kernels_lack(monkeypatch, installed, flags, asked):
    monkeypatch.setattr(recipe_module, "find_spec", lambda name: name in installed or None)
    assert machine_flags(Device("cuda", "nccl", 1), flags) == asked


def test_the_kernel_is_the_one_that_megatron_asks_for():
    path = find_spec("megatron.core").submodule_search_locations[0]
    text = (Path(path) / "tensor_parallel" / "layers.py").read_text()
    assert f"import {FUSION_KERNEL}" in text
    assert "if config.gradient_accumulation_fusion and not _grad_accum_fusion_available" in text
