"""The command ``muybridge``. ``front`` answers what needs no libraries; ``docs/command.md`` is its page."""

from muybridge.cli.front import main
from muybridge.cli.places import configs_dir

__all__ = ["configs_dir", "main"]
