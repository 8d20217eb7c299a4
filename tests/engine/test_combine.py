"""What is cut out of a batch for each module."""

import torch

from fedlora_kernels.engine.combine import _cut
from fedlora_kernels.methods.contract import Pair


def test_a_pair_of_full_rank_is_a_view_and_a_shorter_one_lets_the_padding_go():
    B, A = torch.randn(3, 7, 4), torch.randn(3, 4, 5)
    pair = Pair(B, A, torch.tensor([4, 2, 0]))
    for i, p in enumerate((4, 2, 0)):
        cut = _cut(pair, i)
        assert torch.equal(cut[0], B[i, :, :p])
        assert torch.equal(cut[1], A[i, :p])
        for part, whole in zip(cut, (B, A), strict=True):
            shares = part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
            assert shares == (p == 4)
            assert shares or part.untyped_storage().nbytes() == 4 * part.numel()
