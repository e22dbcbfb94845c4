"""PyTorch's private names, and what is built on them: nothing outside this folder uses one."""
