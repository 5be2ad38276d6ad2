"""Data: from tar shards and feature stores to batches, with nothing lost silently."""
