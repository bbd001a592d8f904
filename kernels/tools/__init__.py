"""Tools of the kernels: the repaired interpreter, the compile check, the benchmark."""
