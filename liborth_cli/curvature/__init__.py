"""K-FAC and EK-FAC factors of every linear layer, estimated from data one block at a time, and how they lie on disk."""
