"""Run a function on several real CPU ranks, each a process of its own.

A fork server imports torch, Lightning and diffusers once per test run; every rank is then forked from it, which takes about
a second instead of ten. Lightning sees torchrun's environment, so that it launches nothing itself (its launcher would run
pytest again).
"""

from __future__ import annotations

import faulthandler
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRELOAD = [
    "pytest",
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "lightning.pytorch",
    "lightning.pytorch.strategies",
    "lightning.pytorch.cli",
    "diffusers.pipelines.wan.pipeline_wan",
    "transformers.models.umt5.modeling_umt5",
    "peft",
    "lightning_modules",
    "datamodules",
]


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _load(name: str, file: str) -> Any:
    """The module that holds the function. Test files lie on no import path, so they are loaded from where they are."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def _rank(rank: int, world: int, port: int, timeout: float, where: tuple[str, str, str], args: bytes, out: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        TORCHELASTIC_RUN_ID="test",
    )
    faulthandler.dump_traceback_later(0.9 * timeout, exit=False)
    import torch

    torch.set_num_threads(1)
    # What a rank started by torchrun or srun has; here it would be the fork server.
    multiprocessing.set_start_method("fork", force=True)
    try:
        module, file, name = where
        function = getattr(_load(module, file), name)
        # Pickled here and not by the queue, whose tensors live only as long as this process.
        out.put((rank, True, pickle.dumps(function(*pickle.loads(args)))))
    except BaseException:
        out.put((rank, False, traceback.format_exc()))
    finally:
        faulthandler.cancel_dump_traceback_later()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def run_ranks(function: Callable[..., Any], *args: Any, world: int = 2, timeout: float = 120.0) -> list[Any]:
    """What ``function(*args)`` returned on each of ``world`` ranks.

    Args:
        function: A function at the top level of its module.
        args: Its arguments, the same on all ranks; the function reads its rank from the environment.
        world: Number of ranks.
        timeout: Seconds until the ranks are taken for hung.

    Raises:
        RuntimeError: With the traceback of a rank that raised, or the exit code of one that died.
        TimeoutError: If a rank neither returned nor raised in time; where it hung is on stderr.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    out, port = context.SimpleQueue(), free_port()
    where = (function.__module__, str(Path(inspect.getfile(function)).resolve()), function.__name__)
    payload = pickle.dumps(args)
    each = [(rank, world, port, timeout, where, payload, out) for rank in range(world)]
    processes = [context.Process(target=_rank, args=args, daemon=False) for args in each]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(results) < world:
            if not out.empty():
                rank, fine, value = out.get()
                if not fine:
                    raise RuntimeError(f"rank {rank} of {world} failed:\n{value}")
                results[rank] = pickle.loads(value)
                continue
            for rank, process in enumerate(processes):
                if process.exitcode is not None and rank not in results and out.empty():
                    raise RuntimeError(f"rank {rank} of {world} died with exit code {process.exitcode}")
            if time.monotonic() > deadline:
                missing = [r for r in range(world) if r not in results]
                raise TimeoutError(f"ranks {missing} of {world} neither returned nor raised within {timeout:g} s")
            time.sleep(0.01)
        for process in processes:
            process.join(20.0)
            if process.exitcode is None:
                raise TimeoutError("a rank returned but did not exit")
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [results[rank] for rank in range(world)]
