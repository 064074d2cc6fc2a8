"""Checkpoints of Megatron's HybridModel: those whose layers are a GPT's, and all others refused."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from config_check import config_differences
from tiny_checkpoint import (
    FAMILIES,
    TOKENS,
    hybrid_twin,
    same,
    tiny_args,
    tiny_tensors,
    write_checkpoint,
)
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from megatron_infoentropy.cli import app
from megatron_infoentropy.convert import (
    ConversionError,
    convert_checkpoint,
    convert_from_hf,
    verify,
    verify_conversion,
)
from megatron_infoentropy.convert.checkpoint import MegatronCheckpoint
from megatron_infoentropy.launch.recipe import load_recipe

DENSE = [family for family, changes in FAMILIES.items() if "num_experts" not in changes]


def twin(separator: str = "", **changes: Any) -> tuple[Namespace, dict[str, Tensor]]:
    """Arguments and parameters of a hybrid of three layers."""
    args = tiny_args(num_layers=3, **changes)
    result: tuple[Namespace, dict[str, Tensor]] = hybrid_twin(args, tiny_tensors(args), separator)
    return result


@pytest.fixture(scope="module", params=DENSE)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a GPT, its `twin` and `stages`, which differ in layout, and their exports."""
    folder = tmp_path_factory.mktemp(request.param)
    args = tiny_args(num_layers=3, **FAMILIES[request.param])
    models = {"gpt": (args, tiny_tensors(args))}
    models |= {"twin": twin(**FAMILIES[request.param])}
    models |= {"stages": twin("|", **FAMILIES[request.param])}
    for name, (arguments, tensors) in models.items():
        write_checkpoint(folder / name, arguments, tensors)
        assert convert_checkpoint(folder / name, folder / f"hf-{name}").family == request.param
    return folder


@pytest.mark.parametrize("name", ["twin", "stages"])
def test_a_hybrid_is_exported_as_the_gpt_of_its_layers_to_the_bit(
    exported: Path, name: str
) -> None:
    assert same(exported / "hf-gpt", exported / f"hf-{name}")
    config, other = ((exported / f"hf-{n}" / "config.json").read_bytes() for n in ("gpt", name))
    assert config == other
    assert config_differences(exported / "gpt", exported / f"hf-{name}") == []


@pytest.mark.parametrize("name", ["twin", "stages"])
def test_both_forms_of_megatrons_side_compute_what_transformers_does(
    exported: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real = verify_conversion(exported / name, exported / "hf-gpt", TOKENS)
    assert real.passed, real
    assert "Megatron's side is its own forward pass" in str(real)
    monkeypatch.setattr(verify, "why_not_megatron", lambda: "it is not there")
    plain = verify_conversion(exported / name, exported / "hf-gpt", TOKENS)
    assert plain.passed, plain
    assert real.megatron_loss == pytest.approx(plain.megatron_loss, rel=1e-6)


def test_the_way_back_makes_a_hybrid_when_asked(exported: Path, tmp_path: Path) -> None:
    hf, start = exported / "hf-gpt", tmp_path / "start"
    done = CliRunner().invoke(app, ["convert-from-hf", str(hf), "--output", str(start), "--hybrid"])
    assert done.exit_code == 0, f"{done.output}{done.exception!r}"
    assert "Megatron's side is its own forward pass" in done.output
    assert "--hybrid-layer-pattern '*-*-*-' " in done.output, "no pattern of files for a shell"
    theirs, ours = (MegatronCheckpoint(path) for path in (exported / "twin", start))
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert (ours.args.hybrid_layer_pattern, ours.args.num_layers) == ("*-*-*-", 6)
    flags = load_recipe(start / "model.yaml")
    assert flags["hybrid-layer-pattern"] == "*-*-*-"
    assert "num-layers" not in flags
    convert_checkpoint(start, tmp_path / "again")
    assert same(hf, tmp_path / "again")


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_layers_in_another_order_are_another_model(tmp_path: Path, kind: str) -> None:
    """What both sides might take for the same, if they shared how layers are counted."""
    args, tensors = twin()
    write_checkpoint(tmp_path / "save", args, tensors)
    convert_checkpoint(tmp_path / "save", tmp_path / "hf")
    first, last = ("0.", "2.") if kind == "attention" else ("1.", "3.")
    order = {first: last, last: first}
    swapped = {}
    for name, tensor in tensors.items():
        rest = name.removeprefix("decoder.layers.")
        number = order.get(rest[:2], rest[:2])
        swapped[name[: len(name) - len(rest)] + number + rest[2:]] = tensor
    write_checkpoint(tmp_path / "swapped", args, swapped)
    assert not verify_conversion(tmp_path / "swapped", tmp_path / "hf", TOKENS).same_outputs


PATTERNS = {
    "M*-*-*": "layer 0 is Mamba, expected attention",
    "*-*-M-": "layer 4 is Mamba, expected attention",
    "*E*E*E": "layer 1 is experts, expected an MLP",
    "G-*-*-": "layer 0 is a gated delta net, expected attention",
    "*-+-D-": "layer 2 is latent attention, expected attention",
    "*--*-*": "layer 2 is an MLP, expected attention",
    "**-*--": "layer 1 is attention, expected an MLP",
    "-*-*-*": "layer 0 is an MLP, expected attention",
    "*-*|-*": "behind its 5 layers an MLP is missing",
    "": "behind its 0 layers an MLP is missing",
    "*-?-*-": r"layer 2 is unknown \('\?'\), expected attention",
    "*-*-*-/*-": "has multi-token-prediction heads behind /",
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_other_patterns_are_refused_with_the_place_before_anything_is_written(
    tmp_path: Path, pattern: str
) -> None:
    args, tensors = twin()
    args.hybrid_layer_pattern = pattern
    write_checkpoint(tmp_path / "save", args, tensors)
    with pytest.raises(ConversionError, match=PATTERNS[pattern]) as refusal:
        convert_checkpoint(tmp_path / "save", tmp_path / "hf")
    assert f"hybrid_layer_pattern={pattern!r} (flag --hybrid-layer-pattern)" in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["save"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rotary_interleaved": True}, "--rotary-interleaved"),
        ({"use_rope_scaling": True}, "--use-rope-scaling"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers"),
        ({"num_experts": 4}, "--num-experts"),
        ({"spec": ["some.module", "hybrid_stack_spec"]}, "--spec"),
    ],
)
def test_what_a_hybrid_ignores_or_has_otherwise_is_refused_by_its_flag(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    args, tensors = twin()
    write_checkpoint(tmp_path / "save", Namespace(**vars(args) | changes), tensors)
    with pytest.raises(ConversionError, match=named):
        convert_checkpoint(tmp_path / "save", tmp_path / "hf")


def test_megatrons_default_layers_may_be_named_and_the_pattern_have_its_old_name(
    tmp_path: Path,
) -> None:
    args, tensors = twin()
    args.spec = ["megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"]
    args.hybrid_override_pattern = args.hybrid_layer_pattern
    del args.hybrid_layer_pattern
    write_checkpoint(tmp_path / "save", args, tensors)
    convert_checkpoint(tmp_path / "save", tmp_path / "hf")
    assert verify_conversion(tmp_path / "save", tmp_path / "hf", TOKENS).passed


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "decoder.layers.1.self_attention.linear_proj.weight",
            "no counterp",
        ),
        (
            "decoder.layers.6.self_attention.linear_proj.weight",
            "no counterp",
        ),
        ("decoder.layers.mlp.linear_fc2.weight", "no counterpart"),
        ("decoder.final_layernorm.weight", "no counterpart"),
        ("decoder.layers.0.mixer.in_proj.weight", "no counterpart"),
        ("", r"lacks .* model\.layers\.1\.mlp\.down_proj\.weight"),
    ],
)
def test_parameters_that_its_pattern_does_not_tell_of_are_named(
    tmp_path: Path, name: str, said: str
) -> None:
    args, tensors = twin()
    if name:
        tensors[name] = torch.zeros(2)
    else:
        del tensors["decoder.layers.3.mlp.linear_fc2.weight"]
    write_checkpoint(tmp_path / "save", args, tensors)
    with pytest.raises(ConversionError, match=f"{said}.*{name}"):
        convert_checkpoint(tmp_path / "save", tmp_path / "hf")


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("mixtral", {"num_key_value_heads": 2}, "HybridModel with experts"),
        (
            "llama",
            {
                "rope_parameters": {
                    **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0},
                    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
                    "original_max_position_embeddings": 8192,
                }
            },
            "rotary scaling, which it ignores, cannot be proved: .* without --hybrid",
        ),
    ],
)
def test_a_model_that_no_hybrid_computes_is_not_imported_as_one(
    tmp_path: Path, kind: str, changes: dict[str, Any], named: str
) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "vocab_size": 60}
    config = AutoConfig.for_model(kind, **sizes | changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "hf")
    with pytest.raises(ConversionError, match=named):
        convert_from_hf(tmp_path / "hf", tmp_path / "start", hybrid=True)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
