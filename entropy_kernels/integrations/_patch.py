"""A function of another package replaced by ours, where its version and signature are those that ours was made for.

:class:`Patch` is the one mechanism of all integrations. It is declared without importing the package that it is about;
:func:`patches` lists all of them, for ``entropy-kernels doctor``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Patch", "PatchRefused", "patches"]


class PatchRefused(RuntimeError):
    """A target that is not what a :class:`Patch` was made for: the message says what was expected and what came."""


@dataclass(eq=False)
class Patch:
    """One replaced attribute of another package: applied and undone by hand, or a context manager.

        with patch:                                      # or patch.apply() ... patch.undo()
            ...
        assert patch.calls                               # that ours ran

    Applying finds every module of the package that has imported the original by name, so its order does not matter.

    Args:
        target: "module:attribute" or "module:Class.attribute".
        make: called with the original; gives what takes its place, of the same signature.
        signature: ``str(inspect.signature(...))`` of what ours was made for.
        package: the distribution whose version counts.
        versions: those that this was tested with.
        what: what ours does better, in a few words.
        signature_of: where the signature is looked at; None: at the target.
        when: asked at each call whether ours serves it, where ours is in place before anybody asks for it; the original
            serves the others. None: all are ours.
        anyway: what a user writes to have it beside an untested version, told where one is refused.

    Attributes:
        calls: how often ours has served since it was put in place.
        active: whether ours is in place.

    Source:
        docs/integrations.md.
    """

    target: str
    make: Callable[[Any], Callable[..., Any]] = field(repr=False)
    signature: str = field(repr=False)
    package: str
    versions: tuple[str, ...]
    what: str
    signature_of: str | None = None
    when: Callable[[], bool] | None = field(default=None, repr=False)
    anyway: str = field(default="", repr=False)
    calls: int = field(default=0, init=False)
    _places: list[tuple[Any, str, Any]] = field(default_factory=list, init=False, repr=False)
    _ours: Any = field(default=None, init=False, repr=False)

    @property
    def active(self) -> bool:
        return bool(self._places)

    def refusal(self, *, any_version: bool = False) -> str | None:
        """Why this cannot be applied here, judged by version alone: nothing is imported.

        ``any_version``: a version that was never tested is no reason.
        """
        try:
            version = importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return f"{self.package} is not installed"
        if any_version or version in self.versions:
            return None
        return (
            f"{self.target}: expected {self.package} {' or '.join(self.versions)}, which this was tested with, got "
            f"{version}; install a tested version{self.anyway and f', or {self.anyway} after reading what changed'}"
        )

    def apply(self, *, any_version: bool = False) -> Patch:
        """Put ours in place; where it is already, nothing happens.

        ``any_version``: also where the version was never tested. The signature must be known all the same; else, and
        for another version, PatchRefused.
        """
        if self.active:
            return self
        if (reason := self.refusal(any_version=any_version)) is not None:
            raise PatchRefused(reason)
        try:
            parent, name = self._parent(self.target)
            original = getattr(parent, name)
            holder, of = self._parent(self.signature_of or self.target)
            found = signature_of(getattr(holder, of))
        except Exception as error:  # whatever a module of theirs raises while it is imported
            got = str(error) if isinstance(error, (ImportError, AttributeError)) else repr(error)
            raise PatchRefused(f"{self.target}: expected to be there in {self.package}, got {got}") from error
        if found != self.signature:
            raise PatchRefused(
                f"{self.signature_of or self.target}: expected the signature {self.signature}, which ours was made "
                f"for, got {found}"
            )
        self.calls = 0
        self._ours = self._counted(self.make(original), original)
        places = [(parent, name)] if isinstance(parent, type) else []
        places += [] if places else self._holders(original)
        for place, attribute in places:
            self._places.append((place, attribute, vars(place).get(attribute)))
            static = isinstance(place, type) and not inspect.isfunction(inspect.getattr_static(place, attribute))
            setattr(place, attribute, staticmethod(self._ours) if static else self._ours)
        return self

    def undo(self) -> None:
        """Put the original back, also where ours was imported meanwhile; where ours is not in place, nothing happens.

        PatchRefused, and nothing is changed, where somebody else has replaced ours meanwhile.
        """
        if not self.active:
            return
        for place, attribute, _ in self._places:
            if getattr(place, attribute, None) is not self._ours:
                raise PatchRefused(
                    f"{self.target}: expected ours in {getattr(place, '__name__', place)}, got another replacement "
                    "made since; undo that one first"
                )
        for place, attribute, before in self._places:
            if before is None:  # it was inherited
                delattr(place, attribute)
            else:
                setattr(place, attribute, before)
        for place, attribute in self._holders(self._ours):
            setattr(place, attribute, self._ours.__wrapped__)
        self._places.clear()

    def __enter__(self) -> Patch:
        return self.apply()

    def __exit__(self, *_: object) -> None:
        self.undo()

    def _parent(self, path: str) -> tuple[Any, str]:
        module, _, attributes = path.partition(":")
        *classes, name = attributes.split(".")
        return functools.reduce(getattr, classes, importlib.import_module(module)), name

    def _holders(self, original: Any) -> list[tuple[Any, str]]:
        """Every module of the package under whose names the original stands."""
        top = self.target.partition(":")[0].partition(".")[0]
        modules = [m for n, m in list(sys.modules.items()) if m is not None and n.partition(".")[0] == top]
        return [(module, name) for module in modules for name, x in list(vars(module).items()) if x is original]

    def _counted(self, ours: Callable[..., Any], original: Any) -> Callable[..., Any]:
        @torch.compiler.disable  # who compiles theirs compiles no counter, nor what ours looks up in a context
        def serve(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return ours(*args, **kwargs)

        # under the original's name and with its attributes: by its name a pickle refers to it in another process
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            return (serve if self.when is None or self.when() else original)(*args, **kwargs)

        call.__wrapped__ = original  # type: ignore[attr-defined]  # what a debugger, or who looks for theirs, finds
        return call


def signature_of(function: Any) -> str:
    """As :class:`Patch` compares them: names, kinds and defaults, without annotations."""
    found = inspect.signature(function, follow_wrapped=False)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    return str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def patches() -> list[Patch]:
    """Every patch that an integration has, applied or not; imports none of the packages they are about."""
    return [
        patch
        for name in ("verl", "trl")
        for patch in importlib.import_module(f"entropy_kernels.integrations.{name}").PATCHES
    ]
