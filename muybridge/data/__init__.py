"""From files to clips: sources, decoding, framing, caches, selections. Knows nothing of Trainer or of data loaders."""

from muybridge.data.clips import Clip

__all__ = ["Clip"]
