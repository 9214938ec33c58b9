"""The planner: which plan is predicted to be the fastest, from a cost model of the hardware."""
