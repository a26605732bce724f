"""Options from the environment: they win over config files, as the machine's word over the file's, and lose to options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from muybridge.cli.messages import closest
from muybridge.cli.spelling import did_you_mean, near
from muybridge.errors import UsageError
from muybridge.registry import VERBS

PREFIX = "MUYBRIDGE_"
PLAIN = ("MUYBRIDGE_DEBUG",)
"""Variables that stand for no option of a verb."""
NOT_OPTIONS = ("config", "help", "print_config")


def variable_of(verb: str, option: str) -> str:
    """``fit`` and ``trainer.max_steps``: MUYBRIDGE_FIT__TRAINER__MAX_STEPS."""
    return f"{PREFIX}{verb.replace('-', '_')}__{option.replace('.', '__')}".upper()


def from_environment(
    verb: str, options: Sequence[str], classes: Sequence[str], variables: Mapping[str, str]
) -> dict[str, str]:
    """The options of a verb that variables set, by variable, as command-line arguments.

    What lies below an option that takes a class (``MODEL__INIT_ARGS__SEED``) is passed on as it is, for the parser to judge.

    Args:
        verb: The verb.
        options: Its options, in full.
        classes: Those of them that take more than a plain value.
        variables: The environment.
    """
    found = {}
    heads = {variable_of(name, ""): name for name in VERBS}
    known = {option.upper(): option for option in options}
    for variable in sorted(name for name in variables if name.startswith(PREFIX) and name not in PLAIN):
        if "__" not in variable:
            # Somebody's own variable may begin so; one that is nearly ours is a slip.
            hits = near(variable.removeprefix(PREFIX), [name.removeprefix(PREFIX) for name in PLAIN])
            if hits:
                meant = [PREFIX + hit for hit in hits]
                raise UsageError(f"the environment has {variable}", " or ".join(PLAIN), did_you_mean(meant))
            continue
        head, _, rest = variable.partition("__")
        owner = heads.get(f"{head}__")
        if owner is None:
            raise UsageError(
                f"the environment has {variable}, and there is no such verb",
                f"{PREFIX}VERB__ and an option of the verb, with two underscores for a dot",
                did_you_mean(near(f"{head}__", heads)) or f"unset {variable}",
            )
        option = rest.replace("__", ".")
        if owner != verb or option.lower() in NOT_OPTIONS:
            continue
        parts = option.split(".")
        parents = {".".join(parts[:count]) for count in range(1, len(parts))}
        if option not in known and not parents & {name.upper() for name in classes}:
            hits, _ = closest(option.lower(), options)
            raise UsageError(
                f"the environment has {variable}, and {verb} has no option {option.lower()}",
                f"{PREFIX}{verb.upper()}__ and an option of it, with two underscores for a dot",
                did_you_mean(variable_of(verb, hit) for hit in hits) or f"unset {variable}",
            )
        found[variable] = f"--{known.get(option, option.lower())}={variables[variable]}"
    return found


def with_environment(arguments: Sequence[str], told: Sequence[str]) -> list[str]:
    """The arguments with those of the environment behind the last config file, but for options that are typed themselves.

    Args:
        arguments: As they were typed; a later file or option wins over an earlier one.
        told: What the environment sets.
    """
    typed = {argument.partition("=")[0] for argument in arguments}
    last = max((place for place, a in enumerate(arguments, 1) if a.startswith("--config=")), default=0)
    new = [argument for argument in told if argument.partition("=")[0] not in typed]
    return [*arguments[:last], *new, *arguments[last:]]
