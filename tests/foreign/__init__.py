"""Checkpoints in the layouts of other projects, and what their models compute, written from the mathematics.

Nothing here uses model code of ours, OpenCLIP's or timm's: a state dict goes in, embeddings come out.
"""
