"""Images: read from anywhere, decoded once, cached, and transformed in whole batches."""
