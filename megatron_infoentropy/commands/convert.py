"""Commands between Megatron's checkpoints and Hugging Face folders."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_infoentropy.commands import Overwrite, out

Verify = Annotated[
    bool | None,
    typer.Option(
        "--verify/--no-verify",
        help="compare what both models compute; default: if memory allows. Files always are",
    ),
]
Text = Annotated[
    Path | None, typer.Option(help="text file to compare on; default: Python's reference texts")
]
Data = Annotated[
    Path | None,
    typer.Option(help="instead of --text an indexed dataset to compare on: its path without .bin"),
]


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Megatron --save folder, or an iter_ folder")],
    output: Annotated[Path, typer.Option(help="Hugging Face folder to write")],
    tokenizer: Annotated[Path, typer.Option(help="Hugging Face tokenizer folder to copy")],
    family: Annotated[
        str, typer.Option(help="of a model with --add-qkv-bias: qwen2, llama, or auto")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, or auto: as saved")
    ] = "auto",
    iteration: Annotated[int | None, typer.Option(help="which one; default: the latest")] = None,
    verify: Verify = None,
    text: Text = None,
    data: Data = None,
    checksums: Annotated[
        bool, typer.Option(help="first compare all of the checkpoint with its manifest")
    ] = True,
    rope_scaling_factor: Annotated[
        float | None, typer.Option(help="trained with, where the checkpoint's trainer did not say")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Export a Megatron checkpoint, of any layout, as a Hugging Face model, and prove it."""
    from megatron_infoentropy.convert import Proof, convert_checkpoint

    done = convert_checkpoint(
        checkpoint,
        output,
        tokenizer=tokenizer,
        family=family,
        dtype=dtype,  # type: ignore[arg-type]
        iteration=iteration,
        overwrite=overwrite,
        checksums=checksums,
        rope_scaling_factor=rope_scaling_factor,
        check=Proof(out.print, verify, text, data),
    )
    out.print(f"{output}: {done.family}, {done.parameters} parameters, {done.dtype}")
    if done.not_qwen2:
        out.print(f"Llama, its o_proj.bias zero, and not Qwen2: {done.not_qwen2}; see --family")


def convert_from_hf(
    model: Annotated[Path, typer.Argument(help="Hugging Face model folder")],
    output: Annotated[Path, typer.Option(help="folder to write, for --pretrained-checkpoint")],
    hybrid: Annotated[
        bool, typer.Option("--hybrid", help="of Megatron's HybridModel, not of its GPTModel")
    ] = False,
    verify: Verify = None,
    text: Text = None,
    data: Data = None,
    overwrite: Overwrite = False,
) -> None:
    """Make a Megatron checkpoint of a Hugging Face model, to train it further, and prove it."""
    from megatron_infoentropy.convert import Proof
    from megatron_infoentropy.convert import convert_from_hf as run

    done = run(
        model,
        output,
        hybrid=hybrid,
        overwrite=overwrite,
        check=Proof(out.print, verify, text, data, imported=True),
    )
    out.print(f"{output}: {done.family}, {done.parameters} parameters, {done.dtype}")
    flags = (f"--{name}" if v is True else f"--{name} {v}" for name, v in done.flags.items())
    out.print(f"Megatron flags (also in {output / 'model.yaml'}): {' '.join(flags)}")
