"""Recipes: sections of Megatron's flags, strictly read."""

from pathlib import Path

import pytest

from megatron_infoentropy.launch.recipe import RecipeError, load_recipe, to_command_line

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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "expected sections of flags, got list"),
        ("lr: 1\n", "section 'lr' must hold"),
        ("a:\n  lr: 1\nb:\n  lr: 2\n", "flag 'lr' is given twice"),
        ("a:\n  lr:\n    b: 1\n", "flag 'lr' has a section as its value"),
        ("a: [\n", "is not YAML"),
        ("a: !!python/object/apply:os.getcwd []\n", "is not YAML"),
    ],
)
def test_anything_else_is_refused_in_words(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, text))


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"no recipe at .*nowhere\.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda p: p.name)
def test_every_example_is_a_recipe(path):
    assert load_recipe(path)["num-layers"] > 0
