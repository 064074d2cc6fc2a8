"""A HybridModel whose layers are those of a GPT: attention (*), then an MLP (-), again and again.

Each of its layers is half of a GPT's, and keeps the names that this half has in a GPT: the halves
of layer 3 are decoder.layers.6.self_attention... and decoder.layers.7.mlp... Its layers are never
stacked, and its last norm is decoder.final_norm.
"""

from argparse import Namespace
from collections.abc import Iterator

KINDS = {
    "*": "attention",
    "-": "an MLP",
    "M": "Mamba",
    "G": "a gated delta net",
    "D": "sparse attention",
    "E": "experts",
    "+": "latent attention",
}
_LAYER, _ATTENTION = "decoder.layers.*.", ("self_attention.", "input_layernorm.")


def pattern_of(args: Namespace) -> str | None:
    """Return a hybrid's layers as its training arguments have them; None of a GPT's."""
    pattern = getattr(args, "hybrid_layer_pattern", None)
    return None if pattern is None else str(pattern)


def pattern_problems(pattern: str) -> Iterator[str]:
    """Yield what no layers of Hugging Face are; where a pipeline stage ends (|) is no part of it.

    Layers are numbered as in the names of parameters.
    """
    said = f"hybrid_layer_pattern={pattern!r:.80} (flag --hybrid-layer-pattern)"
    main, _, heads = pattern.partition("/")
    layers = main.replace("|", "")
    if heads:
        yield f"{said} has multi-token-prediction heads behind /"
    for number, kind in enumerate(layers):
        expected = "*-"[number % 2]
        if kind != expected:
            what = KINDS.get(kind, f"unknown ({kind!r})")
            yield f"{said}: layer {number} is {what}, expected {KINDS[expected]}"
            return
    if len(layers) % 2 or not layers:
        yield f"{said}: behind its {len(layers)} layers an MLP is missing"


def hybrid_name(name: str, place: tuple[int, ...]) -> str:
    """Return how a hybrid stores what a GPT has under a name at a place, () or (layer,)."""
    if not name.startswith(_LAYER):
        return name.replace("decoder.final_layernorm.", "decoder.final_norm.")
    half = name.removeprefix(_LAYER)
    return f"decoder.layers.{2 * place[0] + (not half.startswith(_ATTENTION))}.{half}"
