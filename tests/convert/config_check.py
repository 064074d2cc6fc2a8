"""The fields of config.json that no logit shows, against the saved training arguments."""

import json
from pathlib import Path

from megatron_infoentropy.convert.checkpoint import MegatronCheckpoint
from megatron_infoentropy.convert.hf_config import read_config


def config_differences(checkpoint: Path, folder: Path) -> list[str]:
    """Return a line for every field that differs, between transformers 4 and 5 too."""
    config, args = read_config(folder), MegatronCheckpoint(checkpoint).args
    length = args.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    fields = {
        "max_position_embeddings": (config.max_position_embeddings, length),
        "initializer_range": (config.initializer_range, args.init_method_std),
        "sliding_window": (None if window == length else window, None),
    }
    lines = [
        f"{name} is {value!r}, expected {expected!r}"
        for name, (value, expected) in fields.items()
        if value != expected
    ]
    return lines + _file_differences(folder)


def _file_differences(folder: Path) -> list[str]:
    """Compare what transformers 4 reads of config.json with what transformers 5 does."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "rope_parameters" not in config:
        return []
    rope = config["rope_parameters"]
    pairs = {
        "rope_theta": (config.get("rope_theta", config.get("rotary_emb_base")), rope["rope_theta"])
    }
    if "rotary_pct" in config:
        pairs["rotary_pct"] = (config["rotary_pct"], rope.get("partial_rotary_factor"))
    if rope["rope_type"] != "default":
        scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
        pairs["rope_scaling"] = (config.get("rope_scaling"), scaling)
    return [
        f"{name} is {four!r} for transformers 4, {five!r} for 5"
        for name, (four, five) in pairs.items()
        if four != five
    ]
