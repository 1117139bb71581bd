"""The fused operations as nodes of torch's tape."""
