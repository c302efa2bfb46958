"""What other tools read: the skill or the memory of a split as an adapter, a task vector, or a merge recipe."""
