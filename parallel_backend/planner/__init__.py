"""The planner: predicts what each plan costs on the hardware, and chooses the fastest."""
