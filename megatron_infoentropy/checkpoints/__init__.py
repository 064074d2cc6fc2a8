"""Which checkpoints are complete, which of them a training goes on from, which are kept; no torch.

Below the folder given to `--save`:

    latest_checkpointed_iteration.txt        Megatron's tracker: "1000", or "release"
    infoentropy_checkpoints.json             what stood here before manifests were written
    iter_0001000/...                         Megatron's files
    iter_0001000/infoentropy_manifest.json   size and SHA-256 of each of them, written last

A checkpoint is complete when the tracker has named it and its manifest is there and true.
"""
