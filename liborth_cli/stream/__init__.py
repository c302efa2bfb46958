"""A model that is never in memory as a whole: token rows in, block inputs and output gradients out."""
