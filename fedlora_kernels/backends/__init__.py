"""Who computes. The registry lives here."""
