"""Questions of the GPU programme, one a file; `benchmarks/gpu.py` runs them."""
