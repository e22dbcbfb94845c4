"""Symbolic tracing: graphs over a model's own tensors, with parametrizations inlined."""
