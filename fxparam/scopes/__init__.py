"""How long one evaluation is shared, and where its value is kept meanwhile."""
