"""What happened to a model, for people: what was shared, what was generated."""
