"""Teaching a model one motion from one clip: where motion lives, which boundary to train above, and from which noise to start."""

from muybridge.customization.inverted import Inverted, read_inverted, write_inverted
from muybridge.customization.references import Reference, read_references
from muybridge.customization.tau import KNOWN, Tau

__all__ = ["KNOWN", "Inverted", "Reference", "Tau", "read_inverted", "read_references", "write_inverted"]
