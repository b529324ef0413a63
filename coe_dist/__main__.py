"""`python -m coe_dist` is `coe-dist`."""

import sys

try:
    from coe_dist.cli import main
except ModuleNotFoundError as error:  # another machine's Python got this code, but not what it needs
    if (error.name or "").partition(".")[0] == "coe_dist":
        raise
    sys.exit(
        f"coe-dist: {sys.executable} has no module {error.name}; install coe_dist's requirements there, or set "
        "COE_DIST_PYTHON on that machine to the Python that has them"
    )

if __name__ == "__main__":
    main()
