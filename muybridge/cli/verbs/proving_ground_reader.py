"""The reader that scores clips of the proving ground, made anew."""

from __future__ import annotations


def proving_ground_reader(*, out: str = "runs/reader", clips: int = 12000, tested: int = 150, seed: int = 0) -> None:
    """Train the reader of motion, shape and colour on drawn clips, test it on looks it has not seen, write weights and card.

    With the defaults it makes the reader that ships with the package.

    Args:
        out: Where to: ``reader.safetensors`` and ``reader.json``.
        clips: How many it is trained on.
        tested: Clips of each world that it is tested on, as drawn and damaged.
        seed: Of the clips, the weights and the order.
    """
    from muybridge.errors import UsageError
    from muybridge.progress import Progress
    from muybridge.proving_ground.reader_training import make

    if clips < 200 or tested < 1:
        raise UsageError(f"{clips} clips, {tested} tested", "200 or more, and 1 or more")
    with Progress("clips drawn and tracked", clips, every=10.0) as progress:
        known = make(out, clips, seed, tested, progress.advance)
    width = max(map(len, known["scores"]))
    for world, kinds in known["scores"].items():
        for kind, read in kinds.items():
            shares = ", ".join(f"{name} {value:.3f}" for name, value in read.items())
            print(f"{world:{width}}  {kind:8}  {shares}")
    print(f"reader: {out}/reader.safetensors, and its card beside it")
