"""Cheaper forms of the maps in evaluations: the same function and derivative up to rounding."""
