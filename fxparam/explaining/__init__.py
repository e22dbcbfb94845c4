"""Shows people what happened to a model: what was shared, and what code was generated."""
