"""Quantizers beside the reference: least squared error, learned exponents, room for biases."""
