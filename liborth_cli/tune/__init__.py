"""`tune`: fine-tune so that what is private lies apart from what is general, from the first step on."""
