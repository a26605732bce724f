"""Which training clips a motion comes from: gradients per clip, projected, stored, compared, selected."""

from muybridge.attribution.checks import fidelity, rank_correlation
from muybridge.attribution.influence import Scores, influence, sweep
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
from muybridge.attribution.report import influence_report
from muybridge.attribution.selecting import rank, select
from muybridge.attribution.store import InfluenceStore, StoreWriter

__all__ = [
    "BatchedEngine",
    "CountSketchProjection",
    "DenseProjection",
    "FastfoodProjection",
    "InfluenceStore",
    "NoProjection",
    "ParameterEngine",
    "PerSample",
    "Projection",
    "SRHTProjection",
    "Scores",
    "ShardedEngine",
    "StoreWriter",
    "fidelity",
    "influence",
    "influence_report",
    "per_sample_gradients",
    "rank",
    "rank_correlation",
    "select",
    "sweep",
]
