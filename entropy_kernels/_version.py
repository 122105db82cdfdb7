"""The version, in one place: the package, its metadata and what is kept under it read it here. The support window."""

__version__ = "0.1.0"

#: The oldest and the newest version that the package is tested with; a newer torch is expected to work through its
#: stable ABI. pyproject.toml, constraints.txt and docs/install.md agree with it: tests/test_build.py.
WINDOW = {
    "python": ("3.10", "3.13"),
    "torch": ("2.11", "2.13"),
    "triton": ("3.6", "3.9"),
    "transformers": ("5.20", "5.23"),
}
