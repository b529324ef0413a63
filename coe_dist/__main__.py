"""`python -m coe_dist` is `coe-dist`."""

from coe_dist.cli import main

if __name__ == "__main__":
    main()
