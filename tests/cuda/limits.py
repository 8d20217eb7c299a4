"""What every kernel of csrc/cuda may use, by source. A kernel without a row here fails its gate.

A row says how many threads a block has at most, as the launch bound says (1024 where there is none); how many blocks have to fit
on a multiprocessor at once (some instances of a template may promise more); how many bytes of static shared memory; and whether
the kernel works on the float64 tensor cores.
"""

from typing import NamedTuple


class Limit(NamedTuple):
    threads: int
    blocks: int = 1
    shared: int = 0
    tensor: bool = False


LIMITS = {
    "align_correlate": {"correlate_pairs": Limit(128, blocks=3, shared=32, tensor=True)},
    "align_steps": {"combine": Limit(128), "settle": Limit(128, blocks=4)},
    "back_transform": {"turn_columns": Limit(256, shared=4160)},
    "block_svd": {
        "block_svd_half": Limit(320, blocks=2, shared=832),
        "block_svd_all": Limit(512, shared=832),
        "block_svd_none": Limit(512, shared=832),
    },
    "cholesky": {"factor_grams": Limit(256)},
    "column_sizes": {"column_sizes": Limit(128, shared=1024)},
    "cross": {"cross_parts": Limit(128, blocks=2, tensor=True), "cross_sums": Limit(128)},
    "fast_gram": {"fast_parts": Limit(128, blocks=2), "fast_sums": Limit(128)},
    "gram": {"gram_parts": Limit(128, blocks=2, tensor=True), "gram_sums": Limit(128)},
    "large_polar": {
        "form": Limit(256, shared=8192, tensor=True),
        "prepare": Limit(256, shared=64),
        "weigh": Limit(256, tensor=True),
    },
    "library": {"unpack": Limit(1024)},
    "mixed_sum": {"mix": Limit(128, blocks=2, shared=2240, tensor=True), "sift": Limit(256)},
    "orient": {"orient": Limit(256, shared=4096)},
    "product_judge": {
        "core_tiles": Limit(256, shared=17408, tensor=True),
        "coefficients": Limit(256, shared=21760, tensor=True),
    },
    "product_scale": {"scales": Limit(512, shared=4096)},
    "product_weigh": {"weigh": Limit(256, shared=256)},
    "small_svd": {"team_svd": Limit(64, blocks=4), "thread_svd": Limit(64, blocks=3)},
    "small_polar": {"polar_teams": Limit(64, blocks=4)},
    "stacked_echelon": {
        "echelon": Limit(256, blocks=2, shared=64),
        "find_largest": Limit(256),
        "find_scale": Limit(256),
    },
    "stacked_gram": {"by_gram": Limit(256, tensor=True)},
    "sum_answers": {"tell": Limit(128)},
    "tall_expand": {"expand": Limit(256, blocks=2, tensor=True)},
    "tall_reduce": {"reduce": Limit(256, blocks=2, tensor=True), "clear_arrivals": Limit(1024)},
    "turned": {"turn_tiles": Limit(128, blocks=3)},
    "update_gram": {"client_scales": Limit(128), "client_products": Limit(128, shared=32)},
    "weighted_sum": {"add_up": Limit(128, blocks=5, shared=96)},
}

QUICK = ("back_transform", "library", "mixed_sum", "sum_answers")
"""Sources that the default form of the tests compiles, for one architecture: seconds, where all of them take minutes."""
