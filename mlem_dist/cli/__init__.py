"""The command line: each command parses, calls the function of its name in `mlem_dist.api`, and prints."""

from mlem_dist.cli.main import cli, main

__all__ = ["cli", "main"]
