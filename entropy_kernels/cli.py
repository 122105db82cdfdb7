"""``entropy-kernels doctor | train | bench | fit``."""

from __future__ import annotations

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Entry point of the ``entropy-kernels`` command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="entropy-kernels", description=__doc__)
    parser.parse_args(argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
