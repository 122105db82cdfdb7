"""docs/api.md is what the docstrings say, and the docstrings say of every public name what a caller has to know.

What each rule asks for stands in `problems`; `test_each_rule_has_teeth` breaks them one by one.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from torch import Tensor

pytest.importorskip("docstring_parser")

import api_reference
import entropy_kernels as ek
from api_reference import INHERITED, LAYERS, ROOT, SECTIONS, Entry, Page, Reference, entry

SHAPE = re.compile(r"\((\.\.\.|[A-Z\d])[^)a-z]*\)|\b0-d\b|\bshapes?\b|broadcast")
DTYPE = re.compile(
    r"\b(bf16|fp16|fp32|fp64|float32|float64|int32|int64|ints?|integers?|bool|floats?|dtype)\b|floating.point"
)
UNIT = re.compile(r"\b(nats?|bool|bytes|units?|ids|labels?|shares?)\b", re.I)
NO_WORDS = re.compile(r"(see|as there|as in)\b", re.I)
PAPER = re.compile(r"arXiv \d{4}\.\d{5}")
DOCUMENT = re.compile(r"docs/[\w-]+\.md(?: §\d+)?")
TITLE = re.compile(rf"^({'|'.join(SECTIONS)})\b.*:.*$", re.M)


def problems(x: Entry, reference: Reference) -> Iterator[str]:
    """What the docstring of a public name lacks."""
    if not x.about:
        yield "expected a summary, got none"
    if not callable(x.object):
        return
    known, listed = x.parameters, x.sections.get(x.fields, [])
    names = [name for text, _ in listed for name in text.split(", ")]
    for name in {name for name in names if names.count(name) > 1}:
        yield f"{name}: expected once, got it twice"
    for name in names:
        if name == "others" and {*known} <= {*names}:
            yield "others: expected arguments that are not listed, got none left"
        if name != "others" and name not in known:
            yield f"{name}: expected an argument of the signature, got one that it lacks"
    for name, parameter in known.items():
        yield from of_argument(name, str(parameter.annotation), x.fields, reference.argument(x, name))
    yield from of_attributes(x)
    yield from of_results(x, reference)
    yield from of_form(x, reference)


def of_argument(name: str, annotation: str, section: str, text: str | None) -> Iterator[str]:
    if not text:
        yield f"{name}: expected in {section}, or in those of a function that is linked to, got nothing"
    elif NO_WORDS.match(text) and not INHERITED.match(text):
        yield f"{name}: expected words or 'as in :func:`f`', got {text!r}"
    elif re.search(r"\bTensor\b", annotation) and not re.search(r"\b(int|float|Callable)\b", annotation):
        if not SHAPE.search(text):
            yield f"{name}: expected the shape of a Tensor, got {text!r}"
        if not DTYPE.search(text):
            yield f"{name}: expected the dtype of a Tensor, got {text!r}"
    elif re.search(r"\bTensor\b", annotation) and "Callable" not in annotation and not SHAPE.search(text):
        yield f"{name}: expected what a Tensor may be in place of a number, got {text!r}"


def of_attributes(x: Entry) -> Iterator[str]:
    """What __init__ sets, of a class that is no record: as an argument of the name, or on its own."""
    source = inspect.getsource(x.object.__init__) if inspect.isclass(x.object) and x.fields == "Args" else ""
    there = {*re.findall(r"self\.([a-z]\w*)(?:: [^=]*)? = ", source), *getattr(x.object, "__annotations__", ())}
    told = {
        name for title in ("Args", "Attributes") for names, _ in x.sections.get(title, []) for name in names.split(", ")
    }
    if source:
        for name in sorted(there - told):
            yield f"{name}: expected in Attributes, got nothing"
        for name in {names for names, _ in x.sections.get("Attributes", [])} - there:
            yield f"{name}: expected an attribute that __init__ sets, got none"


def of_results(x: Entry, reference: Reference) -> Iterator[str]:
    if x.returns:
        text = said(x, "Returns", reference)
        if not text:
            yield "Returns: expected, got nothing"
        elif "Tensor" in x.returns:
            for what, pattern in {"shape": SHAPE, "dtype": DTYPE, "unit": UNIT}.items():
                if not pattern.search(text):
                    yield f"Returns: expected the {what}, got {text!r}"
    if x.fields == "Args" and not x.sections.get("Raises") and "Raises nothing" not in x.text:
        yield "Raises: expected, or 'Raises nothing', got neither"
    if x.owner is None:
        source = said(x, "Source", reference) or x.about
        documents = DOCUMENT.findall(source)
        if not PAPER.search(source) and not documents:
            yield f"Source: expected arXiv NNNN.NNNNN or a page of docs/, got {source!r}"
        for document in documents:
            path, _, section = document.partition(" §")
            if not (ROOT / path).exists():
                yield f"Source: expected a page that is there, got {path}"
            elif section and f"\n## {section}. " not in (ROOT / path).read_text(encoding="utf-8"):
                yield f"Source: expected a section of {path}, got {section}"


def said(x: Entry, section: str, reference: Reference) -> str:
    """The text of a section; with that of the function or class that it sends the reader to."""
    text = "\n".join(words for _, words in x.sections.get(section, []))
    for name in api_reference.LINK.findall(text):
        found = reference.find(name, x)
        if found is not None and found is not x and (section == "Returns"):
            text += "\n" + "\n".join(words for _, words in found.sections.get("Attributes", []))
            if INHERITED.search(text):
                text += "\n" + said(found, section, reference)
    return text


def of_form(x: Entry, reference: Reference) -> Iterator[str]:
    """What the parser, and so a reader of the page, would not see."""
    titles = [*TITLE.finditer(x.text)]
    for title in titles:
        if title[0].rstrip() != f"{title[1]}:":
            yield f"{title[1]}: expected a section, with its title on a line of its own, got {title[0]!r}"
    if titles and re.search(rf"^(?!({'|'.join(SECTIONS)})\b)\S", x.text[titles[0].start() :], re.M):
        yield "expected nothing behind the sections, got text at their margin"
    for name, words in [pair for pairs in x.sections.values() for pair in pairs]:
        if INHERITED.match(words) and not reference.linked(words, x):
            yield f"{name}: expected a link to a public name, got {words!r}"


REFERENCE = Reference()


@pytest.mark.parametrize("name", REFERENCE.entries)
def test_every_public_name_is_documented(name):
    found = [*problems(REFERENCE.entries[name], REFERENCE)]
    assert not found, f"{name}:\n" + "\n".join(found)


def test_the_page_is_what_the_docstrings_say():
    made = Page(REFERENCE).text()
    assert made == api_reference.PAGE.read_text(encoding="utf-8"), "docs/api.md: expected as made now; run `make docs`"
    assert max(map(len, made.splitlines())) < 400


def test_every_public_name_is_on_the_page():
    for module in {name for modules in LAYERS.values() for name in modules}:
        home = api_reference.module_of(module)
        public = {name for name in getattr(home, "__all__", ()) if not inspect.ismodule(getattr(home, name))}
        listed = [name for modules in LAYERS.values() for name in modules.get(module, "").split()]
        assert len(listed) == len({*listed})
        known = {name.rpartition(".")[2] for name, x in REFERENCE.entries.items() if x.owner is None}
        assert public <= known, f"{module}: not in LAYERS: {public - known}"


GOOD = """Twice a number.

Args:
    x: (...) fp32 or fp64, nats.
    factor: a number or a 0-d tensor.
    backend: as in :func:`entropy_kernels.logprob_entropy`.

Returns:
    ``x``'s shape and dtype, nats.

Raises:
    TypeError: another dtype.

Source:
    arXiv 2505.22617, Eq. 10; docs/math.md §2.
"""


def twice(x: Tensor, factor: float | Tensor = 2.0, *, backend: str = "auto") -> Tensor:
    raise NotImplementedError


def wrong_in(text: str) -> str:
    return "\n".join(problems(entry("ek.twice", twice, text), REFERENCE))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("Twice a number.\n\n", "", "summary"),
        ("    factor: a number or a 0-d tensor.\n", "", "factor: expected in Args"),
        ("    factor: a number or a 0-d tensor.\n", "    factor: see above.\n", "factor: expected words"),
        ("    backend: as", "    factor: a 0-d tensor.\n    backend: as", "factor: expected once"),
        ("    backend: as", "    other: a number.\n    backend: as", "other: expected an argument of the signature"),
        ("(...) fp32", "fp32", "x: expected the shape"),
        ("(...) fp32 or fp64", "(...) any numbers", "x: expected the dtype"),
        ("a number or a 0-d tensor", "a number", "factor: expected what a Tensor may be"),
        ("as in :func:`entropy_kernels.logprob_entropy`", "as in :func:`no_name`", "backend: expected a link"),
        (
            "as in :func:`entropy_kernels.logprob_entropy`",
            "as in :func:`entropy_kernels.aggregate`",
            "backend: expected in",
        ),
        ("as in :func:`entropy_kernels.logprob_entropy`", "as there", "backend: expected words"),
        ("    backend: as", "    backend: a name.\n    others: as", "others: expected arguments"),
        ("Returns:\n    ``x``'s shape and dtype, nats.\n\n", "", "Returns: expected, got nothing"),
        ("``x``'s shape and dtype, nats", "fp32, nats", "Returns: expected the shape"),
        ("``x``'s shape and dtype, nats", "(...), nats", "Returns: expected the dtype"),
        ("``x``'s shape and dtype, nats", "``x``'s shape and dtype", "Returns: expected the unit"),
        ("Raises:\n    TypeError: another dtype.\n\n", "", "Raises: expected"),
        ("Source:\n    arXiv 2505.22617, Eq. 10; docs/math.md §2.\n", "", "Source: expected arXiv"),
        ("docs/math.md §2", "docs/no.md", "Source: expected a page that is there"),
        ("docs/math.md §2", "docs/math.md §99", "Source: expected a section"),
        ("Returns:\n", "Returns: as follows.\n", "Returns: expected a section"),
        ("\nSource:", "\nA word at the margin.\n\nSource:", "expected nothing behind the sections"),
    ],
)
def test_each_rule_has_teeth(old, new, expected):
    assert wrong_in(GOOD) == ""
    assert GOOD.count(old) == 1
    assert expected in wrong_in(GOOD.replace(old, new))


def test_a_field_without_words_is_a_problem():
    class Record(NamedTuple):
        """A record.

        Attributes:
            first: (N,) int64.

        Source:
            docs/math.md §3.
        """

        first: Tensor
        second: int

    found = [*problems(entry("ek.Record", Record), REFERENCE)]
    assert found == ["second: expected in Attributes, or in those of a function that is linked to, got nothing"]


def test_an_attribute_without_words_is_a_problem():
    class Counter:
        """A counter. Raises nothing.

        Args:
            first: a number.

        Attributes:
            other: a number.

        Source:
            docs/math.md §3.
        """

        def __init__(self, first: int) -> None:
            self.first = self.calls = first
            self.calls: int = first
            self._hidden = 0

    assert [*problems(entry("ek.Counter", Counter), REFERENCE)] == [
        "calls: expected in Attributes, got nothing",
        "other: expected an attribute that __init__ sets, got none",
    ]


def test_help_tells_what_a_call_needs():
    """Without the page: the tensors, the preset, what has to be given, an example, where the rest stands."""
    text = inspect.getdoc(ek.clip_cov_loss)
    for word in (
        "logprob: (B, L)",
        "mask:",
        "seed:",
        "preset:",
        "Returns:",
        "Raises:",
        "loss.backward()",
        "policy_loss",
    ):
        assert word in text
