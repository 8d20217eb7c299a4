"""The oracle: float64 Householder QR and SVD, one matrix at a time; one file per family."""
