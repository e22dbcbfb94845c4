"""Parametrized modules on torch's distributed engines, where an engine must be known by name."""

from fxparam.distributed.parallel import ParametrizedParallel
from fxparam.distributed.sharded import Sharded

__all__ = ["ParametrizedParallel", "Sharded"]
