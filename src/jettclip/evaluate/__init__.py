"""Evaluation: which evaluators run when, and what each of them computes."""
