"""One process or many: the FSDP2 strategy, and checkpoints that any number of processes can go on from.

What Lightning 2.6's ``ModelParallelStrategy`` gets wrong for this toolkit is mended here; ``docs/clusters.md`` lists it.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Iterable, Mapping
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any, Optional

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer

from lightning_modules.checkpoints import METADATA, culprit, damage_is_said, load_plain
from muybridge.backbones.base import Backbone, DType
from muybridge.backbones.sharding import local, shard
from muybridge.errors import UsageError


class FullyShard(ModelParallelStrategy):
    """FSDP2: every rank holds a part of each weight, gradient and optimizer state, and reads its own samples.

    Works on GPUs (NCCL) and on CPUs (gloo) alike. Needs nothing of the job: ``DiffusionModule`` shards its backbones.
    ``trainer.strategy: fully_shard`` is this with its defaults.

    Args:
        replicate: Number of groups of ranks that each hold a whole copy (HSDP): with as many groups as nodes, weights are
            gathered within a node only. 1 shards over all ranks.
        param_dtype: Gather weights and compute in this dtype; shards and optimizer keep theirs. ``bfloat16`` halves what is
            sent; Trainer precision ``bf16-mixed`` instead leaves weights in float32 and computes in bfloat16 where that is safe.
        reduce_dtype: Dtype in which gradients are summed, where ``param_dtype`` is given.
        reshard_after_forward: Give each block's memory back between forward and backward, at the price of gathering it twice.
        cpu_offload: Keep weights, gradients and optimizer states in CPU memory.
        save_distributed_checkpoint: Write a folder to which every rank adds its part; otherwise one file, put together on the
            first rank.
        trust_checkpoints: Unpickle any object when resuming. By default only tensors and plain types are loaded, and a
            checkpoint that holds anything else is refused when it is written.
        process_group_backend: gloo on CPUs and nccl on GPUs where not given.
        timeout_minutes: After so long a collective that some rank never reached is an error.
    """

    def __init__(
        self,
        replicate: int = 1,
        param_dtype: Optional[DType] = None,
        reduce_dtype: DType = "float32",
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        save_distributed_checkpoint: bool = True,
        trust_checkpoints: bool = False,
        process_group_backend: Optional[str] = None,
        timeout_minutes: float = 30.0,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timedelta(minutes=timeout_minutes),
        )
        if replicate < 1:
            raise UsageError(f"FullyShard replicate is {replicate}", "a number of groups, 1 or more")
        self.replicate = replicate
        self.param_dtype = param_dtype
        self.reduce_dtype = reduce_dtype
        self.reshard_after_forward = reshard_after_forward
        self.cpu_offload = cpu_offload
        self.trust_checkpoints = trust_checkpoints
        self._mesh: Optional[DeviceMesh] = None

    # -- setting up ------------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Start the process group and lay out the mesh."""
        world = self.num_nodes * self.num_processes
        if world % self.replicate:
            raise UsageError(
                f"FullyShard replicate is {self.replicate} on {world} ranks", "a divisor of the number of ranks"
            )
        # Lightning's "auto" shards over nodes and calls a node's devices tensor parallel: one node would shard nothing,
        # and all of its ranks would read the same samples.
        self._data_parallel_size, self._tensor_parallel_size = world, 1
        if self.cpu_offload and self._process_group_backend is None and self.root_device.type == "cuda":
            # Shards in CPU memory need collectives of their own, for gradient norms and for checkpoints.
            self._process_group_backend = "cpu:gloo,cuda:nccl"
        super().setup_environment()
        if self.replicate == 1:
            self._mesh = self.device_mesh["data_parallel"]
        else:
            self._mesh = init_device_mesh(
                self.root_device.type, (self.replicate, world // self.replicate), mesh_dim_names=("replicate", "shard")
            )

    @property
    def mesh(self) -> DeviceMesh:
        """The mesh to shard over."""
        if self._mesh is None:
            raise RuntimeError("the mesh exists once the Trainer has set up its processes; shard in configure_model")
        return self._mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every rank reads its own samples."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def shard(self, backbone: Backbone) -> Backbone:
        """Shard a materialized backbone in place; for ``configure_model``, after adapters and freezing."""
        return shard(
            backbone,
            self.mesh,
            param_dtype=getattr(torch, self.param_dtype) if self.param_dtype else None,
            reduce_dtype=getattr(torch, self.reduce_dtype),
            reshard_after_forward=self.reshard_after_forward,
            cpu_offload=self.cpu_offload,
        )

    def model_to_device(self) -> None:
        """Move what is not sharded; with ``cpu_offload`` the shards must stay where they are."""
        if not self.cpu_offload:
            super().model_to_device()
            return
        assert self.model is not None
        from torch.distributed.tensor import DTensor

        for module in self.model.modules():
            for tensors in (module._parameters, module._buffers):
                for tensor in tensors.values():
                    if tensor is not None and not isinstance(tensor, DTensor):
                        tensor.data = tensor.data.to(self.root_device)

    # -- saving ----------------------------------------------------------------------------------------------------

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state by parameter name; that of an optimizer which has not stepped yet is as it began."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        fresh = not optimizer.state
        state = super().optimizer_state(optimizer)
        if fresh:
            # To have states to name, torch steps a fresh optimizer once with zero gradients. Kept, that step would count
            # in the bias correction of the next one, and a run would depend on when it was saved.
            for entry in state.get("state", {}).values():
                for value in entry.values():
                    if isinstance(value, torch.Tensor):
                        local(value).zero_()
            optimizer.state.clear()
        return state

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Optional[Any] = None
    ) -> None:
        """Write under another name and rename, so that a killed job leaves the old checkpoint whole."""
        if not self.trust_checkpoints:
            check_plain({k: v for k, v in checkpoint.items() if k not in ("state_dict", "optimizer_states")})
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path = Path(self.broadcast(str(filepath)))
        partial, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
        if self.global_rank == 0:
            for leftover in (partial, old):
                shutil.rmtree(leftover, ignore_errors=True)
        self.barrier()
        super().save_checkpoint(checkpoint, partial, storage_options)
        self.barrier()
        if self.global_rank == 0:
            if path.exists():
                path.rename(old)
            partial.rename(path)
            _remove(old)
        self.barrier()

    # -- resuming --------------------------------------------------------------------------------------------------

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: Optional[bool] = None) -> dict[str, Any]:
        """Load a folder, or one file of this or any other strategy, whatever number of processes wrote it."""
        path = Path(self.broadcast(str(checkpoint_path)))
        safe = not self.trust_checkpoints if weights_only is None else weights_only
        if path.is_dir():
            with damage_is_said(path):
                return self._load_folder(path, safe)
        if path.is_file():
            return self._load_file(path, safe)
        raise UsageError(
            f"checkpoint {path} does not exist", "a checkpoint file, or the folder of a sharded one", "check ckpt_path"
        )

    def _load_folder(self, path: Path, safe: bool) -> dict[str, Any]:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_optimizer_state_dict,
            set_optimizer_state_dict,
        )

        metadata = load_plain(_metadata_of(path), safe)
        assert self.model is not None
        saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        weights = self.model.state_dict()
        self._check_names({n.removeprefix("state_dict.") for n in saved if n.startswith("state_dict.")}, set(weights))
        # Fills the tensors in place, each rank its part.
        dcp.load({"state_dict": weights}, checkpoint_id=path)
        for index, optimizer in enumerate(self.optimizers):
            key = f"optimizer_{index}"
            if not any(name.startswith(f"{key}.") for name in saved):
                raise UsageError(f"{path} holds no state of optimizer {index}", "a checkpoint of the same job")
            state = {key: get_optimizer_state_dict(self.model, optimizer)}
            dcp.load(state, checkpoint_id=path, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
            set_optimizer_state_dict(self.model, optimizer, state[key], options=StateDictOptions(cpu_offload=True))
            self._forget_others(optimizer, with_entries(saved, f"{key}.state."))
        return metadata

    @torch.no_grad()
    def _load_file(self, path: Path, safe: bool) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        checkpoint = load_plain(path, safe)
        given = checkpoint.pop("state_dict", None)
        if given is None:
            raise UsageError(f"{path} holds no weights of a Lightning module", "a checkpoint that fit wrote")
        assert self.model is not None
        weights = self.model.state_dict()
        self._check_names(set(given), set(weights))
        for name, tensor in weights.items():
            # Every rank maps the file and takes its part; nothing is sent.
            local(tensor).copy_(part_of(given[name], tensor))
        if not self.optimizers:
            return checkpoint
        states = checkpoint.get("optimizer_states", [])
        if len(states) != len(self.optimizers):
            raise UsageError(
                f"{path} holds {len(states)} optimizer states", f"{len(self.optimizers)}, as this job does"
            )
        names = self._names()
        for optimizer, state in zip(self.optimizers, states, strict=True):
            ordered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
            renamed = rename_parameters(state, ordered)
            with_state = set(renamed["state"])
            options = StateDictOptions(full_state_dict=True, strict=False)
            set_optimizer_state_dict(self.model, optimizer, renamed, options=options)
            self._forget_others(optimizer, with_state)
        return checkpoint

    def _names(self) -> dict[int, str]:
        assert self.model is not None
        return {id(parameter): name for name, parameter in self.model.named_parameters()}

    def _forget_others(self, optimizer: Optimizer, with_state: set[str]) -> None:
        """Take away the states that torch made up for parameters which had none when the checkpoint was written.

        A parameter that never had a gradient has none. Torch gives all parameters a state before it loads any.
        """
        names = self._names()
        for parameter in list(optimizer.state):
            if names[id(parameter)] not in with_state:
                del optimizer.state[parameter]

    def _check_names(self, given: set[str], wanted: set[str]) -> None:
        from lightning_modules.base import check_weights

        check_weights(given, wanted, type(self.lightning_module).__name__)


StrategyRegistry.register(
    "fully_shard", FullyShard, description="FSDP2: lightning_modules.parallel.FullyShard", override=True
)


def rename_parameters(state: Mapping[str, Any], ordered: list[Any]) -> dict[str, Any]:
    """An optimizer's state under other keys for its parameters, by their order in its groups.

    Order is what all formats share: a plain optimizer counts its own parameters from 0, Lightning's single files count
    all of the module's, and folders use names. (Lightning takes the first for the second, so that the states of a second
    optimizer, or of adapters in a frozen network, land on parameters they are not of.)

    Args:
        state: A ``state_dict`` of an optimizer.
        ordered: The new keys.
    """
    saved = list(chain.from_iterable(group["params"] for group in state["param_groups"]))
    if len(saved) != len(ordered):
        raise UsageError(
            f"the checkpoint's optimizer has {len(saved)} parameters and this job's {len(ordered)}",
            "the same adapter and trainable settings as in the run that wrote it",
        )
    new = dict(zip(saved, ordered, strict=True))
    groups = [{**group, "params": [new[key] for key in group["params"]]} for group in state["param_groups"]]
    return {"state": {new[key]: value for key, value in state["state"].items()}, "param_groups": groups}


def with_entries(names: Iterable[str], prefix: str) -> set[str]:
    """All that has something below it among dotted names that begin with ``prefix``, which is cut off."""
    found = set()
    for name in names:
        if name.startswith(prefix):
            name = name[len(prefix) :]
            while "." in name:
                name = name.rpartition(".")[0]
                found.add(name)
    return found


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this rank holds of ``like``; all of it where ``like`` is no DTensor."""
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(like, DTensor):
        return whole
    for axis, placement in enumerate(like.placements):
        if isinstance(placement, Shard):
            pieces = whole.chunk(like.device_mesh.size(axis), placement.dim)
            index = like.device_mesh.get_local_rank(axis)
            # There are fewer pieces than ranks where the dimension is short; the last ranks then hold nothing.
            whole = pieces[index] if index < len(pieces) else whole.narrow(placement.dim, 0, 0)
    return whole


def consolidate(path: str | os.PathLike[str], out: str | os.PathLike[str], trust: bool = False) -> Path:
    """Turn the folder of a sharded checkpoint into one file, as a Trainer on one process writes it.

    The file is resumed by any strategy and opened by ``torch.load(weights_only=True)``. It is read and written on the CPU,
    by one process, outside of any process group.

    Args:
        path: The checkpoint folder.
        out: The file to write; appears only when it is whole.
        trust: Unpickle any object, for folders written with ``trust_checkpoints``.
    """
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    folder, out = Path(path), Path(out)
    checkpoint = load_plain(_metadata_of(folder), safe=not trust)
    out.parent.mkdir(parents=True, exist_ok=True)
    tensors, partial = out.with_name(f".{out.name}.tensors"), out.with_name(f".{out.name}.partial")
    try:
        dcp_to_torch_save(folder, tensors)
        loaded = torch.load(tensors, mmap=True, map_location="cpu", weights_only=True)
        checkpoint["state_dict"] = loaded["state_dict"]
        checkpoint["optimizer_states"] = []
        while (state := loaded.get(f"optimizer_{len(checkpoint['optimizer_states'])}")) is not None:
            count = sum(len(group["params"]) for group in state["param_groups"])
            checkpoint["optimizer_states"].append(rename_parameters(state, list(range(count))))
        torch.save(checkpoint, partial)
        partial.replace(out)
    finally:
        tensors.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)
    return out


def _metadata_of(folder: Path) -> Path:
    file = folder / METADATA
    if not file.is_file():
        raise UsageError(f"{folder} is no sharded checkpoint: it has no {METADATA}", "a folder that FullyShard wrote")
    return file


def check_plain(metadata: Mapping[str, Any]) -> None:
    """Refuse to write what could not be read back with ``weights_only``, naming where it is."""
    for key, value in metadata.items():
        buffer = io.BytesIO()
        torch.save(value, buffer)
        buffer.seek(0)
        try:
            torch.load(buffer, weights_only=True)
        except pickle.UnpicklingError as error:
            raise UsageError(
                f"the checkpoint's {key!r} holds an object that could not be loaded again ({culprit(error)})",
                "tensors, numbers, strings, lists and dicts in hyper-parameters and in the states of callbacks",
                "convert it to one of these, or set trust_checkpoints of FullyShard",
            ) from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
