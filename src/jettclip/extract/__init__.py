"""Fills feature stores: asks teachers about every sample once, and keeps the answers beside the shards."""
