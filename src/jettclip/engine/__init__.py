"""Engines: how a student is stepped, on one device or many, behind the same few methods."""
