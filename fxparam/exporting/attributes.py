"""Check whether evaluations change Python attributes, which no graph shows.

    self.calls += 1
    return x * self.calls       each evaluation is another function

``torch.export`` puts attributes back when it is done, so that they are looked at before.
"""

from __future__ import annotations

from typing import Any

from torch.nn import Module
from torch.nn.utils.parametrize import ParametrizationList

from fxparam._torch.names import tree_flatten
from fxparam.eager import rollback

__all__ = ["Attributes"]

# What every module has: its tensors, submodules and hooks.
_STANDARD = set(vars(Module())) - {"training"}


class Attributes:
    """The attributes of a model's parametrizations, while one call of it is traced.

    Seen are assignments, and changes of lists and dictionaries. At the end of the block the
    attributes are put back.

    Attributes:
        changed: whether the call changed any; True as well if it did not come to its end.
    """

    def __init__(self, model: Module) -> None:
        chains = [chain for chain in model.modules() if isinstance(chain, ParametrizationList)]
        self._modules = list(dict.fromkeys(part for c in chains for part in c.modules()))
        self._kept = rollback.Attributes(self._modules)
        self._model = model
        self._before: list[tuple[list[Any], Any]] | None = None
        self.changed = True

    def __enter__(self) -> Attributes:
        # Inside of the call: around it torch.export puts other tensors in the place of buffers.
        self._hooks = [
            self._model.register_forward_pre_hook(self._remember, prepend=True),
            self._model.register_forward_hook(self._look),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._kept.restore()

    def _remember(self, *_: object) -> None:
        if self._before is None:  # a model may call itself
            self._before = self._now()

    def _look(self, *_: object) -> None:
        assert self._before is not None
        self.changed = not all(map(_are_same, self._now(), self._before))

    def _now(self) -> list[tuple[list[Any], Any]]:
        """Return the present attributes and buffers, as leaves and structure."""
        return [
            tree_flatten(
                [
                    {k: v for k, v in vars(module).items() if k not in _STANDARD},
                    dict(module._buffers),  # which forward may bind anew
                ]
            )
            for module in self._modules
        ]


def _are_same(now: tuple[list[Any], Any], before: tuple[list[Any], Any]) -> bool:
    return now[1] == before[1] and all(map(_is_same, now[0], before[0]))


def _is_same(now: object, before: object) -> bool:
    """Check whether a leaf is the object that it was, or an equal number or string."""
    plain = type(now) is type(before) and isinstance(now, (int, float, complex, str))
    return now is before or (plain and now == before)
