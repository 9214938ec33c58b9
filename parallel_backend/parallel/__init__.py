"""How a forward pass is split over ranks. Wraps the model from outside; the only package that uses xfuser."""
