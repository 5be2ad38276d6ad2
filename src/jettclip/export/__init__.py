"""Writes models in the formats of others."""
