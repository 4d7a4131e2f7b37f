"""The report: what is formatted from saved results, and checked against them."""
