"""Compiled libraries live beside this file; see backends/cpu.py for how they are found and checked."""
