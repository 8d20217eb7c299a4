"""Many low-rank pairs into one: exact, batched, certified aggregation of LoRA adapters."""

import logging

from fedlora_kernels._version import __version__ as __version__
from fedlora_kernels.adapters import Adapter as Adapter
from fedlora_kernels.adapters import Limits as Limits
from fedlora_kernels.adapters import LoRAFactors as LoRAFactors
from fedlora_kernels.adapters import Policy as Policy
from fedlora_kernels.adapters import ReadOptions as ReadOptions
from fedlora_kernels.adapters import WriteOptions as WriteOptions
from fedlora_kernels.adapters import open_adapter as open_adapter
from fedlora_kernels.adapters.convert import convert as convert
from fedlora_kernels.aggregate import aggregate as aggregate
from fedlora_kernels.engine.result import Result as Result
from fedlora_kernels.engine.state import State as State
from fedlora_kernels.errors import BackendError as BackendError
from fedlora_kernels.errors import ConvergenceError as ConvergenceError
from fedlora_kernels.errors import FedLoRAError as FedLoRAError
from fedlora_kernels.errors import FormatError as FormatError
from fedlora_kernels.errors import InputError as InputError
from fedlora_kernels.errors import LimitError as LimitError
from fedlora_kernels.errors import MismatchError as MismatchError
from fedlora_kernels.errors import NonFiniteError as NonFiniteError
from fedlora_kernels.errors import OutputOverflowError as OutputOverflowError
from fedlora_kernels.errors import RunError as RunError
from fedlora_kernels.errors import UnsupportedVariantError as UnsupportedVariantError
from fedlora_kernels.errors import WeightError as WeightError
from fedlora_kernels.linalg import Absolute as Absolute
from fedlora_kernels.linalg import Budget as Budget
from fedlora_kernels.linalg import Certificate as Certificate
from fedlora_kernels.linalg import Energy as Energy
from fedlora_kernels.linalg import Frobenius as Frobenius
from fedlora_kernels.linalg import Info as Info
from fedlora_kernels.linalg import Note as Note
from fedlora_kernels.linalg import ProductSVD as ProductSVD
from fedlora_kernels.linalg import QRResult as QRResult
from fedlora_kernels.linalg import Ragged as Ragged
from fedlora_kernels.linalg import Rank as Rank
from fedlora_kernels.linalg import RankRule as RankRule
from fedlora_kernels.linalg import Rotation as Rotation
from fedlora_kernels.linalg import SingularValueRatio as SingularValueRatio
from fedlora_kernels.linalg import SingularValueSum as SingularValueSum
from fedlora_kernels.linalg import SVDResult as SVDResult
from fedlora_kernels.linalg import WeightedSum as WeightedSum
from fedlora_kernels.linalg import align_factors as align_factors
from fedlora_kernels.linalg import core_svd as core_svd
from fedlora_kernels.linalg import mixed_sum as mixed_sum
from fedlora_kernels.linalg import procrustes_rotation as procrustes_rotation
from fedlora_kernels.linalg import product_svd as product_svd
from fedlora_kernels.linalg import rotate_factors as rotate_factors
from fedlora_kernels.linalg import select_rank as select_rank
from fedlora_kernels.linalg import stacked_qr as stacked_qr
from fedlora_kernels.linalg import update_gram as update_gram
from fedlora_kernels.linalg import weighted_sum as weighted_sum
from fedlora_kernels.methods.geometric_median import GeometricMedian as GeometricMedian
from fedlora_kernels.methods.krum import Krum as Krum
from fedlora_kernels.methods.krum import MultiKrum as MultiKrum
from fedlora_kernels.methods.norm_rules import NormClip as NormClip
from fedlora_kernels.methods.norm_rules import TrimmedMean as TrimmedMean
from fedlora_kernels.resize import resize as resize
from fedlora_kernels.resize import resize_all as resize_all

logging.getLogger("fedlora_kernels").addHandler(logging.NullHandler())
