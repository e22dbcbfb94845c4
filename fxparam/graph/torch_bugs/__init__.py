"""Rewrites that are there because torch errs: one a file."""
