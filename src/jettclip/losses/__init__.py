"""Losses: a formula over small terms, each over features that were already gathered from all ranks."""
