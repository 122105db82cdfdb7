"""The versions of verl that this was made for and tested with."""

VERSIONS = ("0.9.1",)
