"""``python -m entropy_kernels``: the command ``entropy-kernels``, where the console script is not on the path."""

import sys

from entropy_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m entropy_kernels"))
