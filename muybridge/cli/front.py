"""The front of the command: help, lists and errors. Nothing imported here is heavy, so it answers at once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Optional

import muybridge
from muybridge.cli.spelling import did_you_mean, near
from muybridge.errors import UsageError
from muybridge.registry import VERBS

USAGE = 2
"""Exit code of errors that the user can mend."""
INTERRUPTED = 128 + signal.SIGINT


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command; returns its exit code.

    Args:
        argv: What follows ``muybridge`` on the command line; taken from ``sys.argv`` where not given.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("MUYBRIDGE_DEBUG", "") not in ("", "0")
    try:
        return run([a for a in arguments if a != "--debug"])
    except UsageError as error:
        if debug:
            raise
        report(error)
        return USAGE
    except SystemExit as leaving:  # --help and --print_config of the parsers end so
        return leaving.code if isinstance(leaving.code, int) else 1 if leaving.code else 0
    except KeyboardInterrupt:
        if debug:
            raise
        print("\nmuybridge: stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # `muybridge list | head`: nobody reads on. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def run(arguments: list[str]) -> int:
    """Answer what needs no libraries; hand the rest to its verb."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] in ("--version", "-V"):
        print(f"muybridge {muybridge.__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb.startswith("-"):
        raise UsageError(f"{verb} comes before the verb", "muybridge VERB [options]", f"verbs: {', '.join(VERBS)}")
    if verb not in VERBS:
        raise UsageError(f"there is no verb {verb!r}", f"one of {', '.join(VERBS)}", did_you_mean(near(verb, VERBS)))
    if verb == "list":
        from muybridge.cli.verbs import list as listing

        return listing.run(rest)
    from muybridge.cli.places import refuse_shadows

    refuse_shadows()
    if VERBS[verb].kind == "tool":
        from muybridge.cli.tools import run_tool

        return run_tool(verb, rest)
    from muybridge.cli.jobs import run_job

    return run_job(verb, rest)


def overview() -> str:
    """What ``muybridge --help`` prints."""
    width = max(map(len, VERBS))
    lines = [
        f"muybridge {muybridge.__version__}: motion in video diffusion models. Distil it, customize it, attribute it.",
        "",
        "usage: muybridge VERB [options]",
        "",
        *(f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items()),
        "",
        "  muybridge fit -c tiny/wan.yaml      train; -c may be given several times, later files win, options win over files",
        "  muybridge fit -c FILE --print_config  the whole configuration, with every default",
        "  muybridge VERB --help               all options of a verb",
        "  --debug                             anywhere: errors with their traceback",
    ]
    return "\n".join(lines)


def rank() -> int:
    """This process's rank, as launchers tell it; 0 where there is only one."""
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def report(error: UsageError) -> None:
    """Print an error without a traceback; ranks other than the first use one line, since all of them usually say the same."""
    text = str(error)
    if text.startswith("Caught "):
        # A data worker sends its exception as the text of its traceback, which ends with the message.
        text = text.rpartition(f"{UsageError.__name__}: ")[2]
    if rank() == 0:
        print(f"error: {text}", file=sys.stderr)
    else:
        print(f"[rank {rank()}] error: " + "; ".join(part.strip() for part in text.splitlines()), file=sys.stderr)
    sys.stderr.flush()
