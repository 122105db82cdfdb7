"""The version, in one place: the package, its metadata and what is kept under it read it here."""

__version__ = "0.1.0"
