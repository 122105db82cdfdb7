"""A patch of another package: where it is put, what is refused, and that ours is what ran."""

from __future__ import annotations

import importlib.metadata
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from entropy_kernels.integrations import _reads
from entropy_kernels.integrations._patch import Patch, PatchRefused, patches

VERSION = importlib.metadata.version("numpy")
SIGNATURE = "(logits, labels, inplace_backward=True)"


class Base:
    def method(self, x: int) -> str:
        return f"theirs {x}"

    @classmethod
    def apply(cls, x: int) -> str:
        return f"theirs {x}"


class Derived(Base):
    pass


@pytest.fixture
def peer() -> Iterator[types.ModuleType]:
    """Two modules of a package: one has a function, the other has imported it by name."""

    def logprobs(logits: Any, labels: Any, inplace_backward: bool = True) -> str:
        return "theirs"

    math, engine = types.ModuleType("somebodys.math"), types.ModuleType("somebodys.engine")
    math.logprobs = engine.imported = logprobs
    math.Base, math.Derived = Base, Derived
    math.engine = engine
    names = {"somebodys": types.ModuleType("somebodys"), "somebodys.math": math, "somebodys.engine": engine}
    sys.modules.update(names)
    yield math
    for name in names:
        del sys.modules[name]


def patch(target: str = "somebodys.math:logprobs", signature: str = SIGNATURE, **given: Any) -> Patch:
    def make(original: Callable[..., str]) -> Callable[..., str]:
        return lambda *args, **kwargs: "ours over " + original(*args, **kwargs)

    return Patch(target, make, signature, **{"package": "numpy", "versions": (VERSION,), "what": "a test", **given})


def test_ours_runs_wherever_the_function_was_imported(peer: Any) -> None:
    ours = patch()
    original = peer.logprobs
    with ours:
        assert peer.logprobs(1, 2) == peer.engine.imported(1, labels=2) == "ours over theirs"
        assert ours.active and ours.calls == 2 and peer.logprobs.__wrapped__ is original
        ours.apply()  # once is enough
        assert peer.logprobs(1, 2) == "ours over theirs"
    assert peer.logprobs is original and peer.engine.imported is original and not ours.active
    ours.undo()
    assert peer.logprobs(1, 2) == "theirs" and ours.calls == 3


def test_undo_of_what_was_never_applied(peer: Any) -> None:
    peer.nothing = None
    patch().undo()
    assert peer.nothing is None


def test_ours_goes_by_the_name_of_the_original(peer: Any) -> None:
    """And has its attributes: a pickle refers to it by that name, and a registry by a mark."""
    peer.logprobs.marked = True
    names = peer.logprobs.__module__, peer.logprobs.__qualname__
    with patch():
        assert (peer.logprobs.__module__, peer.logprobs.__qualname__) == names and peer.logprobs.marked


def test_undo_reaches_who_has_imported_ours(peer: Any) -> None:
    original, ours, late = peer.logprobs, patch().apply(), sys.modules["somebodys"]
    late.imported = peer.logprobs
    ours.undo()
    assert late.imported is peer.logprobs is original and late.imported(1, 2) == "theirs"
    with ours:
        assert ours.calls == 0 and late.imported(1, 2) == "ours over theirs" and ours.calls == 1


def test_a_module_that_cannot_be_imported_is_refused(peer: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "breaks_at_import.py").write_text("raise RuntimeError('no device')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PatchRefused, match=r"breaks_at_import:f: .* got RuntimeError\('no device'\)"):
        patch(target="breaks_at_import:f").apply()


def test_methods_and_class_methods(peer: Any) -> None:
    """Also inherited ones, which undo leaves inherited."""
    method = patch("somebodys.math:Derived.method", "(self, x)")
    apply = patch("somebodys.math:Derived.apply", "(x)")
    with method, apply:
        assert Derived().method(3) == "ours over theirs 3" and Derived.apply(3) == Derived().apply(3)
        assert Derived.apply(3) == "ours over theirs 3"
        assert Base().method(3) == Base.apply(3) == "theirs 3"
    assert Derived().method(3) == Derived.apply(3) == "theirs 3" and not vars(Derived).keys() & {"method", "apply"}


def test_ours_in_place_before_anybody_asks_for_it(peer: Any) -> None:
    """Theirs serves until then, and only what ours has served is counted."""
    on = False
    ours = patch(when=lambda: on)
    with ours:
        assert peer.logprobs(1, 2) == peer.engine.imported(1, 2) == "theirs" and ours.active and ours.calls == 0
        on = True
        assert peer.engine.imported(1, 2) == "ours over theirs" and ours.calls == 1
        on = False
        assert peer.logprobs(1, 2) == "theirs" and ours.calls == 1


def test_what_is_compiled_calls_ours(peer: Any) -> None:
    """A compiler that traced the counter, or a context, would freeze it."""
    peer.logprobs = peer.engine.imported = lambda logits, labels, inplace_backward=True: logits + 1
    on = False
    ours = patch(when=lambda: on)
    ours.make = lambda original: lambda logits, labels, inplace_backward=True: logits + ours.calls
    with ours:
        compiled = torch.compile(peer.logprobs, backend="eager")
        assert compiled(torch.zeros(2), None).tolist() == [1, 1]
        on = True
        assert [compiled(torch.zeros(2), None).tolist() for _ in range(20)] == [[n, n] for n in range(1, 21)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"package": "no-such-thing"}, r"^no-such-thing is not installed$"),
        (
            {"versions": ("0.1", "0.2")},
            rf"^somebodys.math:logprobs: expected numpy 0.1 or 0.2, .* got {VERSION}; install",
        ),
        (
            {"signature": "(logits, labels)"},
            r"expected the signature \(logits, labels\), .* got \(logits, labels, inpl",
        ),
        (
            {"target": "somebodys.math:gone"},
            r"^somebodys.math:gone: expected to be there in numpy, got module .*'gone'",
        ),
        ({"target": "somebodys.gone:f"}, r"^somebodys.gone:f: expected to be there in numpy, got No module named"),
        ({"signature_of": "somebodys.math:Base.method"}, r"^somebodys.math:Base.method: .* got \(self, x\)$"),
    ],
)
def test_what_is_not_known_is_refused(peer: Any, given: dict[str, Any], message: str) -> None:
    ours, original = patch(**given), peer.logprobs
    with pytest.raises(PatchRefused, match=message):
        ours.apply()
    assert peer.logprobs is original and not ours.active


def test_an_untested_version_on_request(peer: Any) -> None:
    """The signature is asked for all the same."""
    with pytest.raises(PatchRefused, match="signature"):
        patch(signature="()", versions=("0.1",)).apply(any_version=True)
    ours = patch(versions=("0.1",)).apply(any_version=True)
    assert peer.logprobs(1, 2) == "ours over theirs"
    ours.undo()


def test_a_later_replacement_is_not_undone(peer: Any) -> None:
    ours = patch().apply()
    mine, peer.engine.imported = peer.engine.imported, len
    with pytest.raises(PatchRefused, match=r"expected ours in somebodys.engine, got another replacement"):
        ours.undo()
    assert ours.active and peer.logprobs is mine
    peer.engine.imported = mine
    ours.undo()


def test_every_patch_is_declared_without_its_package() -> None:
    found = patches()
    assert {one.package for one in found} <= {"verl", "trl"} and len({one.target for one in found}) == len(found)
    for one in found:
        assert one.what and one.versions and not one.active and one.signature.startswith("(")


def test_statistics_of_reads_are_collected() -> None:
    assert _reads.wanted() == ()
    _reads.leave(collision=torch.ones(2))  # nobody collects
    with _reads.collect("collision", "entropy") as outer:
        assert _reads.wanted() == ("collision", "entropy")
        for x in (1.0, 2.0):
            _reads.leave(collision=torch.full((1, 2), x, requires_grad=True), entropy=torch.zeros(1, 2), other=None)
        with _reads.collect("entropy") as inner:
            _reads.leave(entropy=torch.ones(3))
    assert outer["collision"].tolist() == [1, 1, 2, 2] and not outer["collision"].requires_grad
    assert inner["entropy"].tolist() == [1, 1, 1] and _reads.wanted() == ()


def test_a_head_that_was_not_called_is_told() -> None:
    with _reads.collect("collision") as none:
        pass
    with pytest.raises(RuntimeError, match="collision: expected a call of a head that was replaced by ours, got none"):
        none["collision"]
    with pytest.raises(ValueError, match=r"names: expected of entropy, collision, vocab_covariance, got 'sum'"):
        _reads.Collected("sum")
