"""Functions of the similarities of all rows and columns: in tiles, and over whole matrices as the reference."""
