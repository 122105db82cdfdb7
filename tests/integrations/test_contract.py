"""verl and TRL as they are installed have what the table of ``tests/integration_stubs.py`` says."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterator
from typing import Any

import pytest

import integration_stubs
from entropy_kernels.integrations._patch import Patch, patches, signature_of


def resolved(target: str) -> Any:
    path, _, attributes = target.partition(":")
    found = importlib.import_module(path)
    for name in attributes.split("."):
        found = getattr(found, name)
    return found


@pytest.fixture(scope="module", autouse=True)
def _without_ours() -> Iterator[None]:
    """verl's plugin has put ours in place."""
    importlib.import_module("verl")
    active = [one for one in patches() if one.active]
    assert any(one.package == "verl" for one in active), "verl has not loaded our plugin"
    for one in active:
        one.undo()
    yield
    for one in active:
        one.apply()


@pytest.mark.parametrize(("target", "signature"), integration_stubs.table().items())
def test_what_is_relied_on_is_there(target: str, signature: str | None) -> None:
    found = resolved(target)
    assert signature is None or signature_of(found) == signature


@pytest.mark.parametrize("patch", patches(), ids=lambda patch: patch.target)
def test_every_patch_is_for_the_version_that_is_tested(patch: Patch) -> None:
    assert patch.refusal() is None
    assert patch.versions == (importlib.metadata.version(patch.package),)
