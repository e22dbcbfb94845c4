"""The backend of torch.compile: the passes in order, then the inner backend."""
