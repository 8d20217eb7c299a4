"""The kernel API: validated, batched, framework-neutral linear algebra on stacked low-rank factors."""

from fedlora_kernels.linalg.gram import update_gram
from fedlora_kernels.linalg.procrustes import align_factors, procrustes_rotation, rotate_factors
from fedlora_kernels.linalg.qr import stacked_qr
from fedlora_kernels.linalg.ragged import Ragged
from fedlora_kernels.linalg.results import (
    Certificate,
    Info,
    Note,
    ProductSVD,
    QRResult,
    Rotation,
    SVDResult,
    WeightedSum,
    info_text,
    note_text,
)
from fedlora_kernels.linalg.rules import (
    Absolute,
    Budget,
    Energy,
    Frobenius,
    Rank,
    RankRule,
    SingularValueRatio,
    SingularValueSum,
)
from fedlora_kernels.linalg.sums import mixed_sum, weighted_sum
from fedlora_kernels.linalg.svd import core_svd, product_svd
from fedlora_kernels.linalg.threshold import select_rank

__all__ = [
    "Absolute",
    "Budget",
    "Certificate",
    "Energy",
    "Frobenius",
    "Info",
    "Note",
    "ProductSVD",
    "QRResult",
    "Ragged",
    "Rank",
    "RankRule",
    "Rotation",
    "SVDResult",
    "SingularValueRatio",
    "SingularValueSum",
    "WeightedSum",
    "align_factors",
    "core_svd",
    "info_text",
    "mixed_sum",
    "note_text",
    "procrustes_rotation",
    "product_svd",
    "rotate_factors",
    "select_rank",
    "stacked_qr",
    "update_gram",
    "weighted_sum",
]
