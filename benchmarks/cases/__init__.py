"""The cases, by name, in the order in which they are shown."""

from benchmarks.cases import attention, layers, quantized, recurrent, vocoder
from benchmarks.cases.case import Case, Size

__all__ = ["CASES", "Case", "Size"]

_FILES = (recurrent, layers, attention, quantized, vocoder)
CASES: dict[str, Case] = {case.name: case for file in _FILES for case in file.CASES}
