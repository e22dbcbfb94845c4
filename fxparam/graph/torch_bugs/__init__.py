"""What we do because torch errs: a file for each bug, listed in ``docs/torch-bugs.md``.

Each file has a test of torch alone, under its name in ``tests/graph/torch_bugs/``, which fails once
torch is mended: then the file may go as soon as no supported torch has the bug.
"""
