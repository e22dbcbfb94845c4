"""Where a batch of evaluations is faster than one after the other: measured, by op and size.

``python -m benchmarks.batching`` measures it: forward and backward of as many matrices one by one,
and stacked. On a CPU with one thread, torch 2.13, the batch takes, as a multiple of one by one (the
first two rows were measured beside other work):

    op                    2 of 32   8 of 32   2 of 64   8 of 64   8 of 128   8 of 256
    lowered matrix_exp       0.52      0.24      0.67      0.36       0.62       0.92
    lowered reflectors       0.89      0.27      0.82      0.47       0.87       1.01
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

What an op keeps while it works, it keeps for all matrices at once. A batch is made as large as lets
that fit into what the graph holds at its peak: the batch runs before the rest of the graph, and its
backward after the rest's. A quarter of a MiB is always allowed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import Node

from fxparam._torch.fx import op_name
from fxparam.graph.analysis.held_bytes import allowed_bytes
from fxparam.graph.analysis.nodes import tensors_in, value_of

__all__ = ["Gain", "gain_of"]


@dataclass(frozen=True)
class _Costs:
    """Attributes:
    sides: from a number of evaluations on, the most rows or columns up to which a batch gains.
    work: the memory at the peak of forward and backward, in multiples of the matrix.
    forward: the memory at the peak of forward alone.
    """

    sides: tuple[tuple[int, int], ...]
    work: int
    forward: int


# The costliest op comes first: in an evaluation of several, the first one found decides.
_COSTS = {
    "lowered matrix_exp": _Costs(((2, 128), (8, 256)), 6, 12),
    "linalg_householder_product": _Costs(((2, 32), (8, 128)), 6, 2),
    "linalg_matrix_exp": _Costs(((2, 64),), 50, 12),
    "_linalg_svd": _Costs(((8, 32),), 4, 3),
    "_linalg_eigh": _Costs(((8, 64),), 3, 2),
    "linalg_qr": _Costs(((8, 128),), 6, 2),
    "_linalg_solve_ex": _Costs(((2, 64), (8, 128)), 6, 4),
    "linalg_cholesky_ex": _Costs(((8, 128),), 5, 2),
    "linalg_inv_ex": _Costs(((2, 32), (8, 128)), 4, 3),
    "linalg_solve_triangular": _Costs(((2, 64), (8, 128)), 11, 7),
    "bmm": _Costs(((8, 32),), 4, 1),
}
# What is lowered after it was batched. It holds no more than is allowed, whatever the batch.
_LOWERED = {"linalg_matrix_exp": "lowered matrix_exp"}


@dataclass(frozen=True)
class Gain:
    """What is gained by a batch of some evaluations.

    Attributes:
        least: from how many evaluations on a batch is faster; None where it never is.
        bytes_each: the memory that each needs at the peak.
    """

    least: int | None
    bytes_each: int

    def most(self, held: int, max_bytes: float) -> int:
        """Return how many evaluations one batch may hold.

        Args:
            held: the bytes that the graph holds at its peak.
            max_bytes: a limit of the user's on what one batch needs.
        """
        return allowed_bytes(held, max_bytes) // max(1, self.bytes_each)


def gain_of(batch: Iterable[Node], count: int, *, lowered: bool) -> Gain | None:
    """Return the gain of a batch; None if no op in it is known to gain at any size.

    On a device other than a CPU any op of the table is taken to be bound by its launch.

    Args:
        batch: ATen ops on a batch.
        count: of how many evaluations it is.
        lowered: whether ops will be lowered.
    """
    forms = _LOWERED if lowered else {}
    names = ((forms.get(op_name(node), op_name(node)), node) for node in batch)
    found = {name: node for name, node in names if name in _COSTS}
    costliest = next((name for name in _COSTS if name in found), None)
    if costliest is None:
        return None
    costs = _COSTS[costliest]
    (matrix, *_) = tensors_in([value_of(n) for n in found[costliest].all_input_nodes])
    differentiated = any(t.requires_grad for t in tensors_in(value_of(found[costliest])))
    work = costs.work if differentiated else costs.forward
    bytes_each = work * matrix.numel() * matrix.element_size() // count
    if matrix.device.type != "cpu":
        return Gain(2, bytes_each)
    side = max(matrix.shape[-2:])
    return Gain(min((n for n, most in costs.sides if side <= most), default=None), bytes_each)
