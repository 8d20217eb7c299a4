"""What the native libraries have in common: one C ABI (csrc/include/fedlora.h), bound once, for CPUs and for CUDA."""
