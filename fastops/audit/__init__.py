"""What the kernels become on GPUs that need not be here: compiled, disassembled and held against rules."""
