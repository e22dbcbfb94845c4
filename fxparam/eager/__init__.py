"""Parametrized tensors in eager code: registered, read, removed, pickled."""
