"""Greedy decoding, by transformers or by a server."""
