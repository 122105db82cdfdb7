"""docs/api.md from the docstrings: `make docs` writes it, tests/test_api_reference.py holds it to them.

Docstrings are Google's, read by docstring_parser, with a section more, Source. What functions share is documented once:
in Args, `a, b: as in :func:`f`` stands for what f says of a and b, and `others: as in :func:`f`` for all parameters
that are not listed. :meth:`Reference.argument` follows these links; the page shows them.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from docstring_parser.attrdoc import AttributeDocstrings
from docstring_parser.google import GoogleParser, Section, SectionType

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"
INTRODUCTION = """# API reference

Made from the docstrings by `make docs`. `ek` is `import entropy_kernels as ek`; `ek.reference` and `ek.trainer` are
modules to import by name. Shapes: `B` sequences, `L` tokens of each, `N` tokens, `V` entries of the vocabulary, `H` the
width of the hidden states; `(...)` is any shape. Nats are the unit of log-probs, entropies and KL.

## Contents
"""

# layer -> module -> names
LAYERS: dict[str, dict[str, str]] = {
    "Statistics": {"ek": "logprob_entropy token_stats entropy LogprobEntropy TokenStats STATISTICS backends"},
    "From hidden states": {"ek": "linear_logprob_entropy linear_token_stats linear_plan LinearPlan"},
    "Selection": {
        "ek": "token_covariance token_moments TokenMoments random_tokens clip_cov_mask top_tokens kl_cov_mask "
        "budget_tokens SelectionBatch SeedCounter"
    },
    "Control": {"ek": "TokenBatch control Control Controller TargetEntropy methods Method", "ek.batch": "WholeBatch"},
    "Losses": {
        "ek": "policy_loss clip_cov_loss kl_cov_loss linear_policy_loss PolicyLoss PolicyLossModule ClipCovLoss "
        "KlCovLoss aggregate Surrogate surrogates",
        "ek.losses": "AGG_MODES METRICS LOSSES KL_ESTIMATORS CLIP_COV KL_COV ClipCovPreset KlCovPreset kl_estimate "
        "clip_ratio metric_table surrogate_table",
    },
    "Analysis": {"ek": "fit_entropy_law EntropyLaw predicted_entropy_change", "ek.analysis": "LawError"},
    "Logs and figures": {
        "ek.analysis.logs": "read_logs read_log Run pairs",
        "ek.analysis.plots": "entropy_figure performance_figure law_figure fit_figure fits_figure "
        "entropy_change_figure covariance_table png",
    },
    "Hugging Face": {"ek.hf": "causal_lm_logprob_entropy causal_lm_parts CausalLMParts next_tokens"},
    "Definitions in float64": {
        "ek.reference": "statistics gradient token_covariance kl_cov_mask clip_cov_mask budget_tokens in_range "
        "random_keys policy_loss clipped Rows FORMULAS NEED_TARGET"
    },
    "Trainer": {"ek.trainer.ppo": "train", "ek.trainer.config": "TrainerConfig"},
}
# Where a constant is assigned: its docstring stands behind that
ASSIGNED = {
    "STATISTICS": "_rows.NAMES", "AGG_MODES": "losses.aggregation.AGG_MODES", "METRICS": "losses.evaluate.METRICS",
    "LOSSES": "losses.linear.LOSSES", "KL_ESTIMATORS": "losses.kl.KL_ESTIMATORS", "CLIP_COV": "losses.options.CLIP_COV",
    "KL_COV": "losses.options.KL_COV", "FORMULAS": "reference.FORMULAS", "NEED_TARGET": "reference.NEED_TARGET",
}  # fmt: skip

_ONE, _MANY = SectionType.SINGULAR, SectionType.MULTIPLE
SECTIONS = {"Args": _MANY, "Attributes": _MANY, "Returns": _ONE, "Raises": _MANY, "Source": _ONE}
_parser = GoogleParser([Section(name, name, kind) for name, kind in SECTIONS.items()])
LINK = re.compile(r":(?:func|class|meth|data):`~?([\w.]+)`")
INHERITED = re.compile(rf"as(?: in)?\s+{LINK.pattern}(?: and\s+{LINK.pattern})?", re.IGNORECASE)


def module_of(name: str) -> Any:
    """The module that is written ``name`` here; ek.hf is an attribute that is a module."""
    whole = name.replace("ek", "entropy_kernels", 1)
    return importlib.import_module("entropy_kernels.integrations.hf" if name == "ek.hf" else whole)


@dataclasses.dataclass
class Entry:
    """A public name, or a method or property of a public class; its docstring, taken apart."""

    name: str  # as one writes it: ek.Controller.step
    object: Any
    owner: Entry | None  # of a method
    text: str
    about: str  # what stands before the first section
    sections: dict[str, list[tuple[str, str]]]  # Args -> (name, or names with ", " between them, text)
    members: list[Entry]

    @property
    def fields(self) -> str:
        """The section that documents the parameters: those of a record are its fields."""
        record = dataclasses.is_dataclass(self.object) or hasattr(self.object, "_fields")
        return "Attributes" if record else "Args"

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        found = inspect.signature(self.object).parameters if callable(self.object) else {}
        return {name: x for name, x in found.items() if name != "self"}

    @property
    def returns(self) -> str:
        """The annotation; "" for what returns nothing."""
        if inspect.isclass(self.object) or not callable(self.object):
            return ""
        found = str(inspect.signature(self.object).return_annotation)
        return "" if found == "None" else found

    @property
    def home(self) -> str:
        """The file that it stands in."""
        module = ASSIGNED.get(self.name.rpartition(".")[2], "").rpartition(".")[0]
        whole = self.object.__module__ if callable(self.object) else f"entropy_kernels.{module}"
        return whole.replace(".", "/") + ".py"


def members(thing: type) -> dict[str, Any]:
    """Public methods and properties of a class, with those of its private bases; of a module's own only forward."""
    own = [x for x in thing.__mro__[::-1] if x is thing or (x.__name__.startswith("_") and "entropy_k" in x.__module__)]
    return {
        key: member if isinstance(member, property) else getattr(thing, key)
        for key, member in {key: x for home in own for key, x in vars(home).items()}.items()
        if not key.startswith("_") and (key == "forward" or not hasattr(torch.nn.Module, key))
        if isinstance(member, (property, classmethod)) or inspect.isfunction(member)
    }


def entry(name: str, thing: Any, text: str | None = None, owner: Entry | None = None) -> Entry:
    """``text``: the docstring, where the thing itself has none."""
    text = inspect.cleandoc((inspect.getdoc(thing) if text is None else text) or "")
    begins = _parser.titles_re.search(text)
    found = Entry(name, thing, owner, text, text[: begins.start()].strip() if begins else text, {}, [])
    for part in _parser.parse(text).meta:
        names = re.sub(r",\s*", ", ", "".join(part.args[1:]))
        found.sections.setdefault(part.args[0], []).append((names, part.description or ""))
    if inspect.isclass(thing):
        for field, (words, *_) in AttributeDocstrings().get_attr_docs(thing).items():
            found.sections.setdefault("Attributes", []).append((field, inspect.cleandoc(words)))
        for key, member in members(thing).items():
            found.members.append(entry(f"{name}.{key}", member, owner=found))
    return found


class Reference:
    """All entries by name, in the order of the page."""

    def __init__(self) -> None:
        self.layers = {
            layer: [self._read(module, name) for module, names in modules.items() for name in names.split()]
            for layer, modules in LAYERS.items()
        }
        self.entries = {x.name: x for found in self.layers.values() for each in found for x in (each, *each.members)}

    @staticmethod
    def _read(module: str, name: str) -> Entry:
        thing, text = getattr(module_of(module), name), None
        if not callable(thing):
            home, _, assigned = f"ek.{ASSIGNED[name]}".rpartition(".")
            text = AttributeDocstrings().get_attr_docs(module_of(home)).get(assigned, ("",))[0]
        return entry(f"{module}.{name}", thing, text)

    def find(self, name: str, near: Entry) -> Entry | None:
        """What a link in the docstring of ``near`` names: something beside it, or by its whole name."""
        short = re.sub(r"^(entropy_kernels|ek)\.", "", name)
        home = (near.owner or near).name
        for prefix in ("ek",) if short != name else (home, home.rpartition(".")[0], "ek"):
            if f"{prefix}.{short}" in self.entries:
                return self.entries[f"{prefix}.{short}"]
        elsewhere = [x for key, x in self.entries.items() if key.endswith(f".{short}")]
        return elsewhere[0] if len(elsewhere) == 1 else None

    def linked(self, text: str, near: Entry) -> list[Entry]:
        """The entries for which ``text`` stands, if it says "as in f", or "as in f and g"."""
        match = INHERITED.match(text)
        return [x for name in match.groups() if name and (x := self.find(name, near))] if match else []

    def argument(self, of: Entry, name: str) -> str | None:
        """What is said of a parameter here, and where this docstring sends the reader; None: nothing."""
        listed = of.sections.get(of.fields, [])
        text = next((text for names, text in listed if name in names.split(", ")), None)
        own = text is not None
        text = next((text for names, text in listed if names == "others"), "") if text is None else text
        if own and not INHERITED.match(text):
            return text
        found = [x for source in self.linked(text, of) if (x := self.argument(source, name)) is not None]
        return f"{text}\n{found[0]}" if found else None


# ---- the page --------------------------------------------------------------------------------------------------------


def slug(title: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


class Page:
    """The reference in Markdown."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.anchors: dict[str, str] = {}
        for title in reference.entries:
            same = [*self.anchors.values()].count(slug(title))
            self.anchors[title] = f"{slug(title)}-{same}" if same else slug(title)

    def text(self) -> str:
        lines = [INTRODUCTION]
        for layer, entries in self.reference.layers.items():
            lines += [f"**[{layer}](#{slug(layer)})**", "", "| name | what |", "|---|---|"]
            for x in entries:
                what = self.markdown(re.split(r"(?<!Eq)\.\s|\n\n", x.about)[0].rstrip("."), x, links=False)
                what = " ".join(what.split()).replace("|", "\\|")
                lines.append(f"| [`{x.name}`](#{self.anchors[x.name]}) | {what} |")
            lines.append("")
        for layer, entries in self.reference.layers.items():
            lines += [f"## {layer}", ""]
            for x in entries:
                for each in (x, *x.members):
                    lines += [f"{'####' if each.owner else '###'} `{each.name}`", "", *self.described(each)]
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"

    def described(self, x: Entry) -> Iterator[str]:
        if callable(x.object) and x.fields == "Args":
            yield f"```python\n{signature(x)}\n```\n"
        for code, lines in itertools.groupby(x.about.split("\n"), lambda line: line.startswith("    ")):
            words = textwrap.dedent("\n".join(lines))
            yield f"```python\n{words}\n```" if code else self.markdown(words, x)
        yield ""
        for title, heading in {"Args": "Arguments", "Attributes": "Fields", "Raises": "Raises"}.items():
            if title == "Raises" and "Returns" in x.sections:
                yield f"**Returns** {self.markdown(x.sections['Returns'][0][1], x)}\n"
            if title in x.sections:
                yield f"**{heading}**\n"
                for names, text in x.sections[title]:
                    yield f"- {self.named(x, title, names, text)}: {self.markdown(text, x)}".replace("\n", "\n  ")
                yield ""
        if not callable(x.object) and not isinstance(x.object, property):
            yield from (*values(x.object), "")
        if x.owner is None:
            said = f"**Source** {self.markdown(x.sections['Source'][0][1], x)} " if "Source" in x.sections else ""
            yield f"{said}**Code** [{x.home}](../{x.home})\n"

    def named(self, x: Entry, title: str, names: str, text: str) -> str:
        """Parameters with types and defaults, but not where they are documented elsewhere."""
        listed = {name for part, _ in x.sections[title] for name in part.split(", ")}
        each = [name for name in x.parameters if name not in listed] if names == "others" else names.split(", ")
        if title == x.fields and not INHERITED.match(text):
            each = [parameter(x.parameters[name]) if name in x.parameters else name for name in each]
        return "\n".join(textwrap.wrap(", ".join(f"`{name}`" for name in each), 116, break_on_hyphens=False))

    def markdown(self, text: str, x: Entry, links: bool = True) -> str:
        def link(match: re.Match[str]) -> str:
            found = self.reference.find(match[1], x)
            if found is None or not links:
                return f"`{match[1] if found is None else found.name}`"
            return f"[`{found.name}`](#{self.anchors[found.name]})"

        text = LINK.sub(link, text).replace("``", "`")
        if not links:
            return text
        text = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
        return re.sub(r"(?<![\w/`])docs/([\w-]+\.md)(?: §(\d+))?", document, text)


def document(match: re.Match[str]) -> str:
    """A link to a page of docs/, or to a numbered section of it."""
    path, section = match.groups()
    if section is None:
        return f"[{path}]({path})"
    title = re.search(rf"^## ({section}\. .*)$", (PAGE.parent / path).read_text(encoding="utf-8"), re.M)
    return f"[{path} §{section}]({path}#{slug(title[1]) if title else ''})"


def parameter(x: inspect.Parameter) -> str:
    stars = {x.VAR_POSITIONAL: "*", x.VAR_KEYWORD: "**"}.get(x.kind, "")
    kind = getattr(x.annotation, "__forward_arg__", x.annotation)
    default = f'"{x.default}"' if isinstance(x.default, (str, Path)) else repr(x.default)
    typed = stars + x.name + ("" if x.annotation is x.empty else f": {kind}")
    return typed if x.default is x.empty else f"{typed} = {default}"


def signature(x: Entry) -> str:
    parts, kinds = [], [each.kind for each in x.parameters.values()]
    for place, each in enumerate(x.parameters.values()):
        if each.kind is each.KEYWORD_ONLY and kinds.index(each.kind) == place:
            parts.append("*")
        parts.append(parameter(each))
    name, returns = x.name.rpartition(".")[2] if x.owner else x.name, f" -> {x.returns}" if x.returns else ""
    short = f"{name}({', '.join(parts)}){returns}"
    return short if len(short) <= 100 else f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returns}"


def values(constant: Any) -> Iterator[str]:
    """A constant, item by item."""
    for key, value in constant.items() if isinstance(constant, dict) else [(key, "") for key in constant]:
        parts = value if isinstance(value, tuple) else (value,)
        words = "; ".join(", ".join(part) if isinstance(part, tuple) else str(part) for part in parts if part)
        line = f"- `{key}`: {words}" if words and not callable(value) else f"- `{key}`"
        yield textwrap.fill(line, 118, subsequent_indent="  ", break_on_hyphens=False)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(Page(Reference()).text(), encoding="utf-8")
