"""Reports on a run: terminal table and JSON."""
