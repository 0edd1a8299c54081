"""`python -m mlem_dist.cli` is `mlem-dist`."""

from mlem_dist.cli.main import main

if __name__ == "__main__":
    main()
