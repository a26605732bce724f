"""With what code each process of a run leaves."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.plugins.environments import LightningEnvironment


def exit_code(trainer: Any, code: int) -> int:
    """The run's code; 0 of a process that Lightning has started itself.

    The one that started the others is killed (SIGKILL) by Lightning when another leaves before it with anything but 0, and
    whoever waits for the run would see that in place of the code. Launchers outside the run want the code of every process.

    Args:
        trainer: Whose cluster environment says which process this is.
        code: The run's.
    """
    environment = getattr(trainer._accelerator_connector, "cluster_environment", None)
    started = isinstance(environment, LightningEnvironment) and environment.local_rank() != 0
    return 0 if started else code
