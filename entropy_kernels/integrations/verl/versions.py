"""The versions of verl that this was made for and tested with; a patch of it."""

from __future__ import annotations

import functools

from entropy_kernels.integrations._patch import Patch

VERSIONS = ("0.9.1",)
patch = functools.partial(Patch, package="verl", versions=VERSIONS)
