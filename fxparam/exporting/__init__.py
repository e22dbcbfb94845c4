"""Export: programs in which each parametrized tensor is evaluated once, or not at all."""
