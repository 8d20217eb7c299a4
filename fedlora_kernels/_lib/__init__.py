"""Compiled libraries live beside this file; see backends/cpu/library.py for how they are found and checked."""
