"""How one forward is split. Wraps the model from outside; the only place that knows of xfuser."""
