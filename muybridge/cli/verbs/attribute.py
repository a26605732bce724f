"""Projected gradients of clips and queries, into a store."""

from __future__ import annotations

from typing import Any, Literal, Optional

from muybridge.errors import UsageError

TRAINER = {"inference_mode": False, "logger": False}
"""Gradients are wanted of a network that is not trained."""


def attribute(
    trainer: Any,
    model: Any,
    datamodule: Any,
    ckpt_path: Optional[str] = None,
    parts: list[Literal["train", "query"]] = ["train", "query"],  # noqa: B006 - printed by --print_config
) -> None:
    """Go over the training clips and the queries once, and store the projected gradient of each clip's own loss.

    Settings are those of callbacks.GradientCapture among the config's callbacks. Run it again after it was stopped: it goes on.

    Args:
        trainer: Says which devices, precision and strategy; holds the callback.
        model: Whose gradients; its trained parameters count.
        datamodule: Its training clips are the candidates, its validation clips the queries.
        ckpt_path: A checkpoint to load first: a file, a folder, ``last`` or ``best``; the model as it is where not given.
        parts: ``train``, ``query``, or both.
    """
    from callbacks.gradient_capture import GradientCapture
    from muybridge.progress import Progress

    found = [callback for callback in trainer.callbacks if isinstance(callback, GradientCapture)]
    if len(found) > 1:
        raise UsageError(f"{len(found)} GradientCapture callbacks", "one, or none for its defaults")
    if not callable(getattr(datamodule, "in_order", None)):
        raise UsageError(
            f"{type(datamodule).__name__} can't give its clips in order", "VideoData, LatentData, or one of yours"
        )
    if not parts:
        raise UsageError("parts is empty", "train, query, or both")
    capture = found[0] if found else GradientCapture()
    # The loop that this takes the place of knows no training data; caches are checked by way of the datamodule.
    trainer.datamodule, datamodule.trainer = datamodule, trainer
    trainer.prepare_data_per_node = getattr(datamodule, "prepare_data_per_node", True)

    def work() -> dict[str, int]:
        return capture.capture(
            trainer,
            model,
            datamodule,
            list(dict.fromkeys(parts)),
            watch=lambda label, count: Progress(f"{label} (batches)", count, show=trainer.is_global_zero),
        )

    counts = trainer.run_with(model, work, ckpt_path)
    if trainer.is_global_zero:
        said = ", ".join(f"{count} {state}" for state, count in counts.items()) or "nothing new"
        print(f"{capture.out}: {said}" + (" on the first rank" if trainer.world_size > 1 else ""))
