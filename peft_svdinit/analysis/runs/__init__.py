"""Training runs compared fairly: seeds, budgets with the teacher's cost counted, a report."""
