"""`python -m megatron_infoentropy` is the `infoentropy` command."""

from megatron_infoentropy.cli import main

main()
