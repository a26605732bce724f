"""Short errors from jsonargparse's long ones.

jsonargparse reports what went wrong as an indented tree: through which keys and classes it went, and for a Union what each
member objected to. :func:`read` turns the text into its leaves, :func:`deepest` picks the one the user meant (the branch
that got furthest), and :func:`explain` says it as given, expected, to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from muybridge.cli.places import ROOMS
from muybridge.cli.spelling import did_you_mean, near
from muybridge.errors import UsageError
from muybridge.registry import VERBS

LINES = 8
"""No error is longer."""


@dataclass(frozen=True)
class Leaf:
    """One objection.

    Args:
        text: What jsonargparse says.
        keys: The keys from the top to the value.
        classes: The class paths on the way.
        value: The value, as text, where it is told.
    """

    text: str
    keys: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    value: str = ""


class Known(Protocol):
    """What an explanation may ask about the program and the user's files."""

    def options(self, classes: Sequence[str]) -> list[str]:
        """Full names of the options of the verb, or of the last of ``classes``."""

    def classes_for(self, keys: Sequence[str], classes: Sequence[str]) -> dict[str, str]:
        """Short name and import path of the classes that a key takes."""

    def modules(self) -> dict[str, list[str]]:
        """Modules in the user's folders, and the classes each defines."""

    def public(self, module: str) -> list[str]:
        """Classes that a module holds; empty where it can't be imported."""

    def where(self, keys: Sequence[str], word: str) -> str:
        """File and line of a key or a value in the user's configs; empty where it stands in none."""


_KEY = re.compile(r'(?:Parser key "([^"]+)"|--([\w.]+)\.help):\s*(.*)', re.DOTALL)
_CLASS = re.compile(r"Problem with given class_path '([^']+)':\s*(.*)", re.DOTALL)
_CALLABLE = re.compile(r"Type .+ expects a function or a callable class: (.*)")
_UNION = "Does not validate against any of the Union subtypes"


def _dedent(lines: list[str]) -> str:
    filled = [line for line in lines if line.strip()]
    margin = min((len(line) - len(line.lstrip()) for line in filled), default=0)
    return "\n".join(line[margin:] for line in lines).strip("\n")


def read(text: str, keys: tuple[str, ...] = (), classes: tuple[str, ...] = ()) -> list[Leaf]:
    """All leaves of an error text."""
    head, *tail = text.strip("\n").splitlines() or [""]
    if head.startswith("- Expected a path but") and tail:
        # A value that may also be a file is reported as a list of two, the second not indented.
        return read("\n".join([tail[0].removeprefix("- "), *tail[1:]]), keys, classes)
    match = _KEY.match(head)
    if match:
        key, asked, rest = match.groups()
        return read(rest or _dedent(tail), (*keys, *(key or asked).split(".")), classes)
    match = _CLASS.match(head)
    if match:
        return read(match.group(2) or _dedent(tail), keys, (*classes, match.group(1)))
    match = _CALLABLE.match(head)
    if match:
        return read("\n".join([match.group(1), *tail]), keys, classes)
    if head.startswith(_UNION):
        return _read_union(tail, keys, classes)
    body, _, value = text.partition(". Got value: ")
    return [Leaf(body.strip(), keys, classes, value.strip().splitlines()[0] if value.strip() else "")]


def _read_union(lines: list[str], keys: tuple[str, ...], classes: tuple[str, ...]) -> list[Leaf]:
    members: list[list[str]] = []
    value, inside = "", False
    for line in lines:
        if line.startswith("Errors:"):
            inside = True
        elif line.startswith("Given value type:"):
            inside = False
        elif line.startswith("Given value: "):
            value = line.removeprefix("Given value: ").partition(". Got value: ")[0]
        elif inside and line.startswith("  - "):
            members.append([line[4:]])
        elif inside and members:
            members[-1].append(line[4:])
    leaves = [leaf for member in members for leaf in read("\n".join(member), keys, classes)]
    return [leaf if leaf.value or leaf.keys != keys else replace(leaf, value=value) for leaf in leaves]


def deepest(leaves: Sequence[Leaf]) -> list[Leaf]:
    """The leaves of the branch that got furthest; several where members of one Union got equally far."""

    def depth(leaf: Leaf) -> tuple[int, int, bool]:
        return (
            len(leaf.classes),
            len(leaf.keys),
            not leaf.text.startswith(("Expected a <class", "Not a valid subclass")),
        )

    best = max(depth(leaf)[:2] for leaf in leaves)
    kept = [leaf for leaf in leaves if depth(leaf)[:2] == best]
    named = [leaf for leaf in kept if _names_a_class(leaf)]
    plain = [leaf for leaf in kept if re.match(r"Expected a <class '(int|float|bool)'>", leaf.text)]
    if plain:  # the number was meant; the class is a rarity such as a tensor for a learning rate
        return [leaf for leaf in kept if leaf not in named and "NoneType" not in leaf.text]
    if named:
        return named[:1]
    return [leaf for leaf in kept if "NoneType" not in leaf.text] or kept


def _names_a_class(leaf: Leaf) -> bool:
    return bool(
        re.match(r"Expected a dot import path string: \w+$|Import path |No module named|module '|Option '", leaf.text)
    )


_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "list": "a list",
    "dict": "a mapping",
    "NoneType": "null",
}


def words(kind: str) -> str:
    """A type as jsonargparse prints it, in words."""
    kind = kind.strip()
    literal = re.fullmatch(r"(?:typing\.)?Literal\[(.*)\]", kind, re.DOTALL)
    if literal:
        return _or([c.strip().strip("'\"") for c in literal.group(1).split(",")])
    size = re.fullmatch(r"tuple with (\d+) elements", kind)
    if size:
        return f"a list of {size.group(1)} values"
    plain = re.fullmatch(r"<class '([\w.]+)'>", kind)
    name = plain.group(1).rsplit(".", 1)[-1] if plain else kind
    element = re.fullmatch(r"(?:typing\.)?(?:[Ll]ist|Sequence)\[(.*)\]", name, re.DOTALL)
    if element:
        return f"a list, each {words(element.group(1)).removeprefix('each ')}"
    return _WORDS.get(name, f"a {name}" if plain else name.replace("typing.", ""))


def _or(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _dotted(keys: Iterable[str]) -> str:
    return ".".join(k for k in keys if k)


def _at(place: str) -> str:
    return f" ({place})" if place else ""


def explain(text: str, known: Known) -> UsageError:
    """A short error for a long one."""
    leaves = deepest(read(text))
    leaf = leaves[0]
    for explainer in (
        _unknown_option,
        _unknown_class,
        _ambiguous,
        _no_module,
        _no_attribute,
        _not_a_subclass,
        _abstract,
        _missing,
    ):
        found = explainer(leaf, known)
        if found:
            return found
    return _wrong_value(leaves, known)


_UNKNOWN = (
    r"unrecognized arguments: (?:--)?([^\s=]+)",
    r"Subcommand '[^']+' does not accept option '([^']+)'",
    r"Option '([^']+)' is not accepted",
)


def _unknown_option(leaf: Leaf, known: Known) -> UsageError | None:
    group = re.match(r"Group '([^']+)' does not accept option '([^']+)'", leaf.text)
    match = next((m for pattern in _UNKNOWN if (m := re.match(pattern, leaf.text))), None)
    if group is None and match is None:
        return None
    name = ".".join(group.groups()) if group else match.group(1)  # type: ignore[union-attr]
    owner = leaf.classes[-1].rsplit(".", 1)[-1] if leaf.classes else ""
    options = known.options(leaf.classes)
    hits, wrong = closest(name, [*options, "class_path", "init_args"] if owner else options)
    parts = wrong.split(".")
    place = known.where([*leaf.keys, *parts[:-1]], parts[-1])
    dashes = "" if place else "--"
    expected = f"an option of {owner}" if owner else "an option of this verb"
    if not hits and owner in ("LightningModule", "LightningDataModule"):
        return UsageError(
            f"{_dotted(leaf.keys)} has options and no class{_at(place)}",
            "class_path: NAME beside init_args:",
            f"muybridge list {'modules' if owner == 'LightningModule' else 'datamodules'}",
        )
    if not hits:
        siblings = {
            o[len(".".join(parts[:-1])) :].strip(".").split(".")[0]
            for o in options
            if o.startswith(".".join(parts[:-1]))
        }
        expected += f": {_some({s for s in siblings if len(s) > 1} - {'config', 'print_config'})}"
    return UsageError(
        f"unknown {'key' if place else 'option'} {dashes}{_dotted([*leaf.keys, wrong])}{_at(place)}",
        expected,
        did_you_mean(dashes + _dotted([*leaf.keys, hit]) for hit in hits),
    )


def closest(name: str, options: Sequence[str]) -> tuple[list[str], str]:
    """Options spelt like ``name``, and how much of ``name`` is in doubt.

    A misspelt branch makes all that lies below it unknown, so a dotted name is compared part by part from the left.
    """
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        head = ".".join(parts[:count])
        level = sorted({".".join(o.split(".")[:count]) for o in options if o.count(".") >= count - 1})
        if head in level:
            continue
        parent = ".".join(parts[: count - 1])
        siblings = [o for o in level if o.rpartition(".")[0] == parent]
        hits = near(parts[count - 1], [s.rpartition(".")[2] for s in siblings])
        return [f"{parent}.{h}".strip(".") for h in hits], head
    return [], name


def _unknown_class(leaf: Leaf, known: Known) -> UsageError | None:
    match = re.match(r"(?:Unexpected import path format|Expected a dot import path string): (\S+)", leaf.text)
    if not match:
        return None
    name = match.group(1)
    options = known.classes_for(leaf.keys, leaf.classes)
    hits = near(name, options)
    shipped = "the name of a class that ships" if hits and len(options) > 8 else f"one of {_some(options)}"
    return UsageError(
        f"{_dotted(leaf.keys)}: there is no class {name}{_at(known.where(leaf.keys, name))}",
        f"{shipped}, or the import path of your own such as my_file.{name}",
        did_you_mean(hits),
    )


def _some(names: Iterable[str], count: int = 12) -> str:
    names = sorted(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _ambiguous(leaf: Leaf, known: Known) -> UsageError | None:
    match = re.match(r"Multiple subclasses with name (\w+)\. [^:]*: (.+?)\.?$", leaf.text)
    if not match:
        return None
    name, paths = match.groups()
    return UsageError(
        f"{_dotted(leaf.keys)}: several classes are called {name}{_at(known.where(leaf.keys, name))}",
        f"a full class_path: {' or '.join(paths.split(', '))}",
    )


def _no_module(leaf: Leaf, known: Known) -> UsageError | None:
    match = re.match(r"No module named '([^']+)'", leaf.text)
    if not match or not leaf.classes:
        return None
    path, missing = leaf.classes[-1], match.group(1)
    keys = _dotted(leaf.keys)
    place = known.where(leaf.keys, path)
    if missing != path and not path.startswith(missing + "."):
        # The user's module is there, and imports something that is not.
        return UsageError(f"{keys}: importing {path} failed{_at(place)}: {leaf.text}", f"{missing} to be installed", "")
    name = path.rsplit(".", 1)[-1]
    yours = [f"{module}.{cls}" for module, inside in known.modules().items() for cls in inside]
    room = missing.split(".")[0]
    if room in ROOMS:
        hint = f"{room} is muybridge's own package: give yours another name"
    else:
        hint = did_you_mean(near(path, yours) or near(name, known.classes_for(leaf.keys, leaf.classes[:-1])))
    return UsageError(
        f"{keys}: there is no module {missing}, named by class_path {path}{_at(place)}",
        "a file next to the config or in the current directory, or an installed package",
        hint,
    )


def _no_attribute(leaf: Leaf, known: Known) -> UsageError | None:
    match = re.match(r"module '([^']+)' has no attribute '([^']+)'", leaf.text)
    if not match or not leaf.classes:
        return None
    module, name = match.groups()
    inside = known.public(module)
    options = known.classes_for(leaf.keys, leaf.classes[:-1])
    hint = did_you_mean([f"{module}.{n}" for n in near(name, inside)] or near(name, options))
    if not hint and module in ROOMS:
        hint = f"{module} is muybridge's own package: give yours another name"
    return UsageError(
        f"{_dotted(leaf.keys)}: module {module} has no class {name}{_at(known.where(leaf.keys, leaf.classes[-1]))}",
        f"one of its classes: {_some(inside)}" if inside else f"a class defined in {module}",
        hint,
    )


def _not_a_subclass(leaf: Leaf, known: Known) -> UsageError | None:
    match = re.match(r"Import path (\S+) does not correspond to a subclass of (\w+)", leaf.text)
    if not match:
        return None
    path, base = match.groups()
    options = known.classes_for(leaf.keys, leaf.classes)
    name = path.rsplit(".", 1)[-1]
    return UsageError(
        f"{_dotted(leaf.keys)}: {path} is no {base}{_at(known.where(leaf.keys, path))}",
        f"a subclass of {base}" + (f", such as {_some(options, 6)}" if options else ""),
        f"if it is yours, write class {name}({base})" if name not in options.values() else "",
    )


def _abstract(leaf: Leaf, known: Known) -> UsageError | None:
    match = re.match(r"Expected an instantiatable class, but (\S+) is abstract", leaf.text)
    if not match:
        return None
    path = match.group(1)
    return UsageError(
        f"{_dotted(leaf.keys)}: {path} has abstract methods{_at(known.where(leaf.keys, path))}",
        "a class that defines them all",
        f"or one of {_some(known.classes_for(leaf.keys, leaf.classes), 6)}",
    )


def _missing(leaf: Leaf, known: Known) -> UsageError | None:
    match = re.match(r"the following arguments are required: (.+)", leaf.text)
    if not match:
        return None
    # At the top jsonargparse puts the verb before the name, inside a class nothing.
    missing = [re.sub(rf"^({'|'.join(VERBS)})\.", "", name.strip()) for name in match.group(1).split(",")]
    owner = leaf.classes[-1].rsplit(".", 1)[-1] if leaf.classes else "this verb"
    names = [f"{'' if leaf.classes else '--'}{_dotted([*leaf.keys, name])}" for name in missing]
    return UsageError(
        f"{' and '.join(names)} not given",
        f"a value for {'each' if len(names) > 1 else 'it'}: {owner} has no default",
        "give a config: -c FILE (muybridge list configs)" if not leaf.classes and "model" in missing else "",
    )


EXPLAINERS = (
    _unknown_option,
    _unknown_class,
    _ambiguous,
    _no_module,
    _no_attribute,
    _not_a_subclass,
    _abstract,
    _missing,
)
"""Each knows one kind of objection; what none knows is a wrong value."""


def _wrong_value(leaves: Sequence[Leaf], known: Known) -> UsageError:
    leaf = leaves[0]
    value = next((x.value for x in leaves if x.value), "")
    nested = re.match(r"NestedArg\(key='.*?', val=(.*)\)$", value)
    value = (nested.group(1) if nested else value).strip("'")
    kinds = [m.group(1) for x in leaves if (m := re.match(r"Expected an? (.+)", x.text, re.DOTALL))]
    choices = [
        c.strip().strip("'") for k in kinds if "Literal[" in k for c in k[k.index("[") + 1 : k.rindex("]")].split(",")
    ]
    if choices:
        expected = _or(choices)
    elif kinds:
        expected = " or ".join(dict.fromkeys(words(k.splitlines()[0]) for k in kinds))
    else:
        expected = "; ".join(dict.fromkeys(line.strip() for x in leaves for line in x.text.splitlines()[:3]))
    shown = value if len(value) <= 100 else value[:97] + "..."
    keys = _dotted(leaf.keys)
    if not keys:
        return UsageError(shorten(leaf.text))
    given = (
        f"{keys}: {shown}{_at(known.where(leaf.keys, value))}"
        if value
        else f"{keys} can't be read{_at(known.where(leaf.keys[:-1], leaf.keys[-1]))}"
    )
    hint = did_you_mean(near(value, choices))
    if "a list" in expected and value.startswith("{"):
        hint = "in YAML, put '- ' before the first key of each element"
    return UsageError(given, expected, hint)


def shorten(text: str) -> str:
    """Any text within the limit."""
    lines = [line for line in text.splitlines() if line.strip()]
    return "\n".join(
        lines
        if len(lines) <= LINES
        else [*lines[: LINES - 1], f"... ({len(lines) - LINES + 1} lines more with --debug)"]
    )
