"""Which training clips a motion comes from: gradients per clip, projected, stored, compared, selected."""

from muybridge.attribution.per_sample import (
    BatchedEngine,
    ParameterEngine,
    PerSample,
    ShardedEngine,
    per_sample_gradients,
)
from muybridge.attribution.projection import (
    CountSketchProjection,
    DenseProjection,
    FastfoodProjection,
    NoProjection,
    Projection,
    SRHTProjection,
)

__all__ = [
    "BatchedEngine",
    "CountSketchProjection",
    "DenseProjection",
    "FastfoodProjection",
    "NoProjection",
    "ParameterEngine",
    "PerSample",
    "Projection",
    "SRHTProjection",
    "ShardedEngine",
    "per_sample_gradients",
]
