"""Graph to facts: what nodes do and depend on. Nothing here changes a graph."""
