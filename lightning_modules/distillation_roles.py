"""Who takes part in a distillation: a student, its teacher and a critic, as copies or as adapters on one base."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal, Optional

import torch
from torch import Tensor, nn

from lightning_modules.two_optimizers import TwoOptimizers
from muybridge.backbones.adapters import LoRA, adapter_parameters, check_lora, disabled, inject, only, switch_to
from muybridge.backbones.base import Backbone
from muybridge.backbones.causal import bidirectional
from muybridge.batch import Batch
from muybridge.diffusion.conditioning import Conditioning
from muybridge.errors import UsageError
from muybridge.export import export_pipeline

Role = Literal["student", "teacher", "critic"]


class ThreeRoles(TwoOptimizers):
    """A job of a student, a teacher and a critic that begin at one model.

    A role that is not the teacher is a backbone of its own, or an adapter on the teacher's, which memory then holds once. What
    runs as a role runs inside :meth:`playing`.

    A subclass has ``steps``, ``sampling`` and ``guidance``.

    Args:
        teacher: The model that is distilled; frozen.
        student: The student, where it is no copy of the teacher.
        critic: The critic, where it is no copy of the teacher.
        student_lora: Makes the student an adapter on the teacher.
        critic_lora: Makes the critic an adapter on the teacher.
    """

    steps: list[float]
    guidance: float
    sampling: Any

    def __init__(
        self,
        teacher: Backbone,
        student: Optional[Backbone],
        critic: Optional[Backbone],
        student_lora: Optional[LoRA],
        critic_lora: Optional[LoRA],
    ) -> None:
        super().__init__()
        for role, given, lora in (("student", student, student_lora), ("critic", critic, critic_lora)):
            if given is not None and lora is not None:
                raise UsageError(
                    f"{role} and {role}_lora are both given",
                    "one of them: the adapter sits on the teacher's weights",
                    f"leave {role} out, or {role}_lora",
                )
            if lora is not None and (lora.t_min is not None or lora.t_max is not None):
                raise UsageError(
                    f"{role}_lora has a time range", "none: it acts at all times", "remove t_min and t_max"
                )
        self.teacher = teacher
        # Adapters live on the teacher, and what is no copy is registered once.
        self.own_student = student if student is not None else None if student_lora is not None else _copy(teacher)
        self.own_critic = critic if critic is not None else None if critic_lora is not None else _copy(teacher)
        self.student_lora, self.critic_lora = student_lora, critic_lora

    # -- who they are ----------------------------------------------------------------------------------------------

    @property
    def student(self) -> Backbone:
        """The student; on shared weights it is what the base runs as outside of :meth:`playing`."""
        return self.own_student if self.own_student is not None else self.teacher

    @property
    def critic(self) -> Backbone:
        """The critic; on shared weights only inside ``playing("critic")``."""
        return self.own_critic if self.own_critic is not None else self.teacher

    def roles(self) -> dict[str, Backbone]:
        return {"student": self.student, "teacher": self.teacher, "critic": self.critic}

    @property
    def sampled(self) -> Backbone:
        return self.student

    @contextmanager
    def playing(self, role: Role) -> Iterator[Backbone]:
        """The backbone of a role, with the adapters switched as the role has them; teacher and critic see whole clips."""
        backbone = self.roles()[role]
        lora = {"student": self.student_lora, "critic": self.critic_lora, "teacher": None}[role]
        with ExitStack() as switched:
            if backbone is self.teacher and (self.student_lora is not None or self.critic_lora is not None):
                switched.enter_context(disabled(backbone) if lora is None else only(backbone, role))
            if role != "student":
                switched.enter_context(bidirectional(backbone))
            yield backbone

    @property
    def speaker(self) -> Backbone:
        """Whose text encoder serves all roles, so that memory holds one; they are checked to mean the same by a text."""
        roles = (self.teacher, self.student, self.critic)
        return next((role for role in roles if "text_encoder" in role.components), self.teacher)

    def text(self, batch: Batch, backbone: Backbone) -> Conditioning:
        """The batch's conditioning, encoded by the speaker whoever asks."""
        return super().text(batch, self.speaker).to(backbone.device)

    def can_encode(self, backbone: Backbone, prompt: str) -> bool:
        return super().can_encode(backbone, prompt) or super().can_encode(self.speaker, prompt)

    def check_roles(self) -> None:
        """Refuse roles that do not go together."""
        teacher = self.teacher
        for role in ("student", "critic"):
            backbone = self.roles()[role]
            if backbone.family != teacher.family:
                raise UsageError(
                    f"the {role} is {backbone.family} and the teacher {teacher.family}",
                    "one family: they share latents, noise levels and text",
                    f"give the {role} a checkpoint of {teacher.family}, or leave it out to begin at the teacher's weights",
                )
            if (
                backbone.geometry != teacher.geometry
                or backbone.schedule.prediction != teacher.schedule.prediction
                or backbone.max_text_length != teacher.max_text_length
            ):
                raise UsageError(
                    f"the {role} at {backbone.checkpoint.given} has other latents, predictions or text than the teacher at"
                    f" {teacher.checkpoint.given}",
                    "the same VAE factors and channels, kind of prediction and max_text_length",
                    "check the two paths",
                )
        for lora in (self.student_lora, self.critic_lora):
            if lora is not None:
                check_lora(teacher, lora)

    # -- what is trained -------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        self.teacher.requires_grad_(False)
        for role, own, lora in (
            ("student", self.own_student, self.student_lora),
            ("critic", self.own_critic, self.critic_lora),
        ):
            if own is not None:
                own.networks.requires_grad_(True)
            else:
                assert lora is not None
                inject(self.teacher, lora, role)
        if self.student_lora is not None:
            switch_to(self.teacher, "student")

    def beside(self, role: str) -> list[nn.Parameter]:
        """What a role's optimizer updates beside the role's own weights."""
        return []

    def trained(self, role: str) -> dict[str, nn.Parameter]:
        """The parameters that a role's optimizer updates, by name."""
        own = self.own_student if role == "student" else self.own_critic
        inside = own.parameters() if own is not None else adapter_parameters(self.teacher, role).values()
        wanted = {id(p) for p in [*inside, *self.beside(role)] if p.requires_grad}
        return {n: p for n, p in self.named_parameters() if id(p) in wanted}

    def to_average(self) -> Optional[set[str]]:
        """The student's: nobody samples the critic."""
        return set(self.trained("student"))

    # -- out -------------------------------------------------------------------------------------------------------

    def reference_videos(self, batch: Batch, steps: int, on_step: Any = None) -> Tensor:
        """The teacher's videos of the same prompts and noises, by its own sampler and guidance."""
        sampling = replace(self.sampling, steps=steps, guidance=self.guidance)
        with self.playing("teacher") as teacher:
            return self.make_videos(batch, sampling, on_step, teacher)

    def export(self, out: str) -> list[str]:
        """The student as a diffusers pipeline directory whose scheduler holds its steps; an adapter is merged into it.

        A run that kept an average exports the average.
        """
        if self.average is not None:
            # For good: what is merged could not be taken apart again.
            self.average.swap_in(self)
        if self.student_lora is not None:
            from muybridge.backbones.adapters import merge_adapter, remove_adapter

            if self.critic_lora is not None:
                remove_adapter(self.teacher, "critic")
            merge_adapter(self.teacher, "student")
        return [str(export_pipeline(self.student, out, self.steps))]


def _copy(backbone: Backbone) -> Backbone:
    """Another backbone of the same settings that is not loaded yet, to be trained."""
    if backbone.networks:
        raise ValueError("a copy of a backbone whose weights are loaded: build the job before materialize()")
    twin = copy.deepcopy(backbone)
    # Small steps of 16-bit weights round to nothing; the teacher's own may stay in 16 bits.
    twin.dtype = torch.float32
    return twin
