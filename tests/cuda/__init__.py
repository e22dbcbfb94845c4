"""What only a GPU shows: results in the precisions that it has, CUDA graphs, autotuned kernels."""
