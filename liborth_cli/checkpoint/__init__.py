"""Files: reading, planning, writing and committing safetensors checkpoints, bit for bit."""
