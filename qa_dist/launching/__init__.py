"""`qa-dist launch`: the processes of one machine started with Accelerate, watched, and accounted for."""
