"""Dense linear algebra that says how exact it is. Tensors in, tensors out; no files, no options."""
