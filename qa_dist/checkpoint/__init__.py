"""What outlives a process: weights and directories."""
