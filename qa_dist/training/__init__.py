"""The training system: engines, batches, the loop and the evaluation. Knows tasks only through `tasks.task`."""
