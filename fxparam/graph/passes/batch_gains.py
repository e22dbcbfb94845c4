"""Where a batch of evaluations is faster than one after the other: measured, by op and size.

``python -m benchmarks.batching`` measures it: forward and backward of as many matrices one by one,
and stacked. On a CPU with one thread, torch 2.13, the batch takes, as a multiple of one by one:

    op                    2 of 32   8 of 32   2 of 64   8 of 64   8 of 128   8 of 256
    matrix_exp               0.70      0.44      0.77      0.70       1.09       1.17
    householder_product      0.87      0.30      1.01      0.38       0.47       1.13
    eigh                     1.20      0.82      0.98      0.91       0.95       0.97
    svd                      1.11      0.84      1.01      0.96       1.41       0.92
    qr                       1.15      0.65      0.98      0.90       0.89       0.99
    solve                    0.72      0.37      0.88      0.57       0.90       1.01
    cholesky                 1.00      0.55      1.13      0.76       0.80       1.12
    inv                      0.92      0.47      1.00      0.65       0.83       1.07
    solve_triangular         0.99      0.53      0.92      0.82       0.94       1.71
    matmul                   1.33      0.81      1.77      0.99       1.05       1.06
    pointwise                0.77      0.48      1.10      0.79       0.92       1.19

Pointwise ops alone are not batched: Inductor makes one kernel of each chain as it is.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.fx import Node

from fxparam._torch.fx import op_name
from fxparam.graph.analysis.nodes import tensors_in, value_of

__all__ = ["is_worthwhile", "largest_batch"]

#: A stack has at most as many bytes: what an op keeps while it runs, it keeps for all at once.
_MAX_STACK_BYTES = 4 << 20

# By op, the most rows or columns from a number of evaluations on. The costliest op comes first: in
# an evaluation of several it is the first one found that decides.
_GAINS: dict[str, tuple[tuple[int, int], ...]] = {
    "linalg_householder_product": ((2, 32), (8, 128)),
    "linalg_matrix_exp": ((2, 64),),
    "_linalg_svd": ((8, 32),),
    "_linalg_eigh": ((8, 64),),
    "linalg_qr": ((8, 128),),
    "_linalg_solve_ex": ((2, 64), (8, 128)),
    "linalg_cholesky_ex": ((8, 128),),
    "linalg_inv_ex": ((2, 32), (8, 128)),
    "linalg_solve_triangular": ((2, 16), (8, 64)),
    "bmm": ((8, 32),),
}


def is_worthwhile(batch: Iterable[Node], count: int) -> bool | None:
    """Check whether the batch is faster than as many evaluations one after the other.

    On a device other than a CPU any op of the table is taken to be bound by its launch.

    Args:
        batch: ATen ops on a batch.
        count: how many evaluations it stands for.

    Returns:
        The answer; None if nothing in the evaluations is known to gain at any size.
    """
    found = {op_name(node): node for node in batch if op_name(node) in _GAINS}
    costliest = next((name for name in _GAINS if name in found), None)
    if costliest is None:
        return None
    (matrix, *_) = tensors_in([value_of(n) for n in found[costliest].all_input_nodes])
    if matrix.device.type != "cpu":
        return True
    side = max(matrix.shape[-2:])
    return any(count >= least and side <= most for least, most in _GAINS[costliest])


def largest_batch(results: Iterable[Tensor], max_bytes: float) -> int:
    """Return how many evaluations one batch may hold, by the bytes of one evaluation's results."""
    most = max(each.numel() * each.element_size() for each in results)
    return int(min(_MAX_STACK_BYTES, max_bytes) // max(1, most))
