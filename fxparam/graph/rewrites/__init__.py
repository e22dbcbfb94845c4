"""Rewrites of ops in evaluations, a file each: the op, the condition, and what takes its place."""
