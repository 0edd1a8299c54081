"""`python -m mlem_dist` is `mlem-dist`."""

from mlem_dist.cli import main

if __name__ == "__main__":
    main()
