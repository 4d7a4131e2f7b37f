"""Files that are whole or absent: results, tensors, hashes of code, provenance, progress."""
