"""Which tokens run in which step: sequences, the scheduler, the engine loop. Standard library only."""
