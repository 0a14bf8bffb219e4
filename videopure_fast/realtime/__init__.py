"""Clips that arrive while others are purified: a server, its cameras, and studies of its latency."""
